"""Flan-T5-XL (3B) on your own instructions: 3 epochs, 16 examples a device, AdamW.

    jax-it train --config configs/flan_t5_xl.py:8 --workdir runs/flan_t5_xl \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl

The argument is the number of devices (default 8). Weights, gradients and optimizer state are 16 bytes a
parameter, 46 GB in all: they are split over the devices by mesh.fsdp.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "8") -> ml_collections.ConfigDict:
    devices = int(arg or 8)
    config = defaults.default()
    config.model.path = "google/flan-t5-xl"
    config.model.remat = "layer"

    config.data.train = [{"path": "train.jsonl"}]
    config.data.eval = [{"path": "validation.jsonl"}]
    config.data.max_source_length = 512
    config.data.max_target_length = 128

    config.train.duration = "3 epochs"
    config.train.batch_size = 16 * devices
    config.train.optimizer.name = "adamw"
    config.train.optimizer.learning_rate = 5e-5
    config.train.optimizer.schedule = "linear"
    config.train.optimizer.warmup = "500 steps"
    config.train.optimizer.weight_decay = 0.01
    config.train.checkpoint_every = "500 steps"

    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
