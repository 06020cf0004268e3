"""SmolLM2-135M-Instruct on your own instructions or conversations: a laptop will do.

    jax-it train --config configs/smollm2_135m.py --workdir runs/smollm2_135m \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl

`configs/smollm2_135m.py:lora` trains adapters alone.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"

    config.data.train = [{"path": "train.jsonl"}]
    config.data.eval = [{"path": "validation.jsonl"}]
    config.data.max_seq_length = 1024
    config.train.batch_size = 32

    config.train.duration = "3 epochs"
    config.train.optimizer.schedule = "cosine"
    config.train.optimizer.final_lr_ratio = 0.1
    config.train.optimizer.warmup = "3%"
    config.eval.metrics = ["rougeL", "bleu", "exact_match"]
    config.eval.max_new_tokens = 256

    if arg == "lora":
        config.model.lora.rank = 16
        config.model.lora.alpha = 32.0
        config.train.optimizer.learning_rate = 5e-4
    elif not arg:
        config.train.optimizer.learning_rate = 5e-5
    else:
        raise ValueError("the argument may be 'lora' or nothing")
    return config
