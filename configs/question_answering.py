"""Question answering: Flan-T5-base on SQuAD, an answer from a passage; every annotator's answer counts.

jax-it train --config question_answering --workdir runs/question_answering
jax-it eval --workdir runs/question_answering
"""

import ml_collections

from jax_it import config as defaults

# The model is trained on the first answer; an evaluation takes each prediction's best match among all of them.
ANSWERS = "{{answers.text | join(' ||| ')}}"
TEMPLATES = [
    "question: {{question}} context: {{context}} ||| " + ANSWERS,
    "{{context}}\n\n{{question}} ||| " + ANSWERS,
    "Read this and answer the question.\n\n{{context}}\n\nQuestion: {{question}} ||| " + ANSWERS,
]


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "google/flan-t5-base"

    data = {"path": "rajpurkar/squad", "name": "squad", "format": "datasets"}
    config.data.train = [{**data, "split": "train", "template": TEMPLATES}]
    config.data.eval = [{**data, "split": "validation", "template": TEMPLATES[:1]}]
    config.data.max_source_length = 512
    config.data.max_target_length = 32

    config.train.duration = "3 epochs"
    config.train.batch_size = 128
    config.train.optimizer.name = "adafactor"
    config.train.optimizer.learning_rate = 1e-3
    config.train.optimizer.schedule = "constant"
    config.train.optimizer.warmup = "100 steps"
    config.train.checkpoint_every = "500 steps"
    config.eval.every = "500 steps"
    config.eval.best = "token_f1"
    config.eval.metrics = ["exact_match", "token_f1"]
    return config
