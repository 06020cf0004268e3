"""Qwen2.5-0.5B-Instruct on your own instructions or conversations: one accelerator of 16 GB or more.

    jax-it train --config configs/qwen2_5_0_5b.py --workdir runs/qwen2_5_0_5b \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl

`configs/qwen2_5_0_5b.py:lora` trains adapters alone.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "Qwen/Qwen2.5-0.5B-Instruct"

    config.data.train = [{"path": "train.jsonl"}]
    config.data.eval = [{"path": "validation.jsonl"}]
    config.model.remat = "layer"
    config.data.max_seq_length = 2048
    config.train.batch_size = 64

    config.train.duration = "3 epochs"
    config.train.optimizer.schedule = "cosine"
    config.train.optimizer.final_lr_ratio = 0.1
    config.train.optimizer.warmup = "3%"
    config.eval.metrics = ["rougeL", "bleu", "exact_match"]
    config.eval.max_new_tokens = 256

    if arg == "lora":
        config.model.lora.rank = 16
        config.model.lora.alpha = 32.0
        config.train.optimizer.learning_rate = 2e-4
    elif not arg:
        config.train.optimizer.learning_rate = 2e-5
    else:
        raise ValueError("the argument may be 'lora' or nothing")
    return config
