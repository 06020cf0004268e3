"""Translation: mT5-base on OPUS-100, English to German and back.

jax-it train --config translation --workdir runs/translation
jax-it eval --workdir runs/translation
"""

import ml_collections

from jax_it import config as defaults

TO_GERMAN = "Translate to German: {{translation.en}} ||| {{translation.de}}"
TO_ENGLISH = "Translate to English: {{translation.de}} ||| {{translation.en}}"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "google/mt5-base"

    data = {"path": "Helsinki-NLP/opus-100", "subset": "de-en", "format": "datasets"}
    config.data.train = [{**data, "split": "train", "name": "opus100", "template": [TO_GERMAN, TO_ENGLISH]}]
    config.data.eval = [
        {**data, "split": "validation", "name": "en-de", "template": [TO_GERMAN], "limit": 1000},
        {**data, "split": "validation", "name": "de-en", "template": [TO_ENGLISH], "limit": 1000},
    ]
    config.data.max_source_length = 128
    config.data.max_target_length = 128

    config.train.duration = "1 epoch"
    config.train.batch_size = 512
    config.train.label_smoothing = 0.1
    config.train.optimizer.name = "adafactor"
    config.train.optimizer.learning_rate = 1e-3
    config.train.optimizer.schedule = "rsqrt"
    config.train.optimizer.warmup = "1000 steps"
    config.train.checkpoint_every = "1000 steps"
    config.eval.every = "1000 steps"
    config.eval.best = "bleu"
    config.eval.metrics = ["bleu", "chrf"]
    return config
