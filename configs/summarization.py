"""Summarization: Flan-T5-base on CNN/DailyMail, news articles to their highlights.

    jax-it train --config summarization --workdir runs/summarization
    jax-it eval --workdir runs/summarization

The scores of this task in the literature are rouge1, rouge2 and rougeLsum, whose sentences are lines. T5's vocabulary
has no line break, so each sentence of a prediction is put on a line before it is scored: rougeLsum_sentences.
"""

import ml_collections

from jax_it import config as defaults

TEMPLATES = [
    "summarize: {{article}} ||| {{highlights}}",
    "Write highlights of this article.\n\n{{article}} ||| {{highlights}}",
    "{{article}}\n\nWhat are the main points of the article above? ||| {{highlights}}",
]


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "google/flan-t5-base"

    data = {"path": "abisee/cnn_dailymail", "subset": "3.0.0", "name": "cnn_dailymail", "format": "datasets"}
    config.data.train = [{**data, "split": "train", "template": TEMPLATES}]
    config.data.eval = [{**data, "split": "validation", "template": TEMPLATES[:1], "limit": 1000}]
    config.data.max_source_length = 1024
    config.data.max_target_length = 128
    config.data.max_truncated = 0.6

    config.train.duration = "3 epochs"
    config.train.batch_size = 128
    config.train.optimizer.name = "adafactor"
    config.train.optimizer.learning_rate = 1e-3
    config.train.optimizer.schedule = "constant"
    config.train.optimizer.warmup = "100 steps"
    config.train.checkpoint_every = "1000 steps"
    config.eval.every = "1000 steps"
    config.eval.best = "rougeLsum_sentences"
    config.eval.metrics = ["rouge1", "rouge2", "rougeL", "rougeLsum_sentences"]
    return config
