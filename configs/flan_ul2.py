"""Flan-UL2 (20B) on your own instructions, on 64 chips of a TPU v5e or more: 3 epochs, 16 examples a chip, AdamW.

    jax-it plan --config configs/flan_ul2.py --topology v5e:8x8
    jax-it train --config configs/flan_ul2.py:64 --workdir runs/flan_ul2 \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl

The argument is the number of chips (default 64). Weights and optimizer state are 12 bytes a parameter, 235 GB in
all, split over the chips by mesh.fsdp.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "64") -> ml_collections.ConfigDict:
    devices = int(arg or 64)
    config = defaults.default()
    config.model.path = "google/flan-ul2"
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
    config.train.optimizer.warmup = "3%"
    config.train.optimizer.weight_decay = 0.01
    config.train.checkpoint_every = "500 steps"

    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
