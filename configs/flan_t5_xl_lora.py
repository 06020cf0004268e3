"""LoRA of Flan-T5-XL (3B) on your own instructions: 0.3 % of the weights are trained, above 5.7 GB in bfloat16.

    jax-it train --config configs/flan_t5_xl_lora.py --workdir runs/flan_t5_xl_lora \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "google/flan-t5-xl"
    config.model.remat = "layer"
    config.model.lora.rank = 16
    config.model.lora.alpha = 32.0
    config.model.lora.targets = ["q", "v"]
    config.model.lora.dropout = 0.05

    config.data.train = [{"path": "train.jsonl"}]
    config.data.eval = [{"path": "validation.jsonl"}]
    config.data.max_source_length = 512
    config.data.max_target_length = 128

    config.train.duration = "3 epochs"
    config.train.batch_size = 64
    config.train.optimizer.learning_rate = 3e-4
    config.train.optimizer.schedule = "linear"
    config.train.optimizer.warmup = "3%"
    return config
