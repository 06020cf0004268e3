"""Dialogue: Flan-T5-base on Dolly's open questions and Alpaca's instructions, mixed by size.

jax-it train --config dialogue --workdir runs/dialogue
jax-it eval --workdir runs/dialogue
"""

import ml_collections

from jax_it import config as defaults

DOLLY = "{{instruction}}{% if context %}\n\n{{context}}{% endif %} ||| {{response}}"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "google/flan-t5-base"

    config.data.train = [
        {"path": "databricks/databricks-dolly-15k", "name": "dolly", "format": "datasets", "template": [DOLLY]},
        {"path": "yahma/alpaca-cleaned", "name": "alpaca", "format": "datasets", "template": ["alpaca"]},
    ]
    config.data.validation_size = 500
    config.data.mixing = "proportional"
    config.data.mixing_cap = 20000
    config.data.mixing_temperature = 2.0
    config.data.max_source_length = 512
    config.data.max_target_length = 256

    config.train.duration = "3 epochs"
    config.train.batch_size = 128
    config.train.optimizer.name = "adafactor"
    config.train.optimizer.learning_rate = 5e-4
    config.train.optimizer.schedule = "cosine"
    config.train.optimizer.warmup = "100 steps"
    config.train.checkpoint_every = "500 steps"
    config.eval.every = "500 steps"
    config.eval.metrics = ["rougeL", "chrf"]
    return config
