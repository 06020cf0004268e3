"""Llama-3.1-70B-Instruct on your own instructions or conversations: 1.1 TB in training, over 64 chips or more.

    jax-it train --config configs/llama3_1_70b.py --workdir runs/llama3_1_70b \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl

`configs/llama3_1_70b.py:lora` trains adapters alone, above linear layers in 4 bits (QLoRA): 41 GB.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "meta-llama/Llama-3.1-70B-Instruct"

    config.data.train = [{"path": "train.jsonl"}]
    config.data.eval = [{"path": "validation.jsonl"}]
    config.model.remat = "layer"
    config.data.max_seq_length = 4096
    config.train.batch_size = 256
    config.mesh.data = 2  # XLA gathers weights more slowly among all chips of a slice than among half
    config.mesh.fsdp = -1

    config.train.duration = "3 epochs"
    config.train.optimizer.schedule = "cosine"
    config.train.optimizer.final_lr_ratio = 0.1
    config.train.optimizer.warmup = "3%"
    config.eval.metrics = ["rougeL", "bleu", "exact_match"]
    config.eval.max_new_tokens = 256

    if arg == "lora":
        config.model.quantize = "nf4"
        config.model.lora.rank = 16
        config.model.lora.alpha = 32.0
        config.train.optimizer.learning_rate = 1e-4
    elif not arg:
        config.train.optimizer.learning_rate = 5e-6
    else:
        raise ValueError("the argument may be 'lora' or nothing")
    return config
