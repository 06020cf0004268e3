"""A causal language model, from SmolLM2-135M to Llama-3.1-70B, on your own instructions or conversations.

    jax-it train --config causal_lm:smollm2-135m --workdir runs/smollm2 \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl
    jax-it train --config causal_lm:llama-3.1-8b,lora --workdir runs/llama_lora

The argument is a name of the table below. `,lora` trains adapters alone; for the three largest, above linear layers in
4 bits (QLoRA). In training, all weights with gradients and optimizer state take 16 bytes a parameter:

    smollm2-135m     a laptop will do
    qwen2.5-0.5b     one accelerator of 16 GB or more
    smollm3-3b       49 GB, split over devices; with adapters 6.2 GB
    llama-3.2-3b     51 GB; with adapters 6.4 GB
    llama-3.1-8b     128 GB; with adapters 5.8 GB
    gemma-2-9b       148 GB; with adapters 6.3 GB
    llama-3.1-70b    1.1 TB, over 64 chips or more; with adapters 41 GB
"""

from typing import NamedTuple

import ml_collections

from jax_it import config as defaults


class Model(NamedTuple):
    path: str  # on the hub
    batch_size: int
    max_seq_length: int
    learning_rate: float
    lora_learning_rate: float
    data_axis: int  # whole copies of the model; -1: one on each device, else the weights are split over devices
    lora_quantize: str = "none"


MODELS = {
    "smollm2-135m": Model("HuggingFaceTB/SmolLM2-135M-Instruct", 32, 1024, 5e-5, 5e-4, -1),
    "qwen2.5-0.5b": Model("Qwen/Qwen2.5-0.5B-Instruct", 64, 2048, 2e-5, 2e-4, -1),
    "smollm3-3b": Model("HuggingFaceTB/SmolLM3-3B", 128, 4096, 1e-5, 2e-4, 1),
    "llama-3.2-3b": Model("meta-llama/Llama-3.2-3B-Instruct", 128, 4096, 1e-5, 2e-4, 1),
    "llama-3.1-8b": Model("meta-llama/Llama-3.1-8B-Instruct", 128, 4096, 1e-5, 2e-4, 1, "nf4"),
    "gemma-2-9b": Model("google/gemma-2-9b-it", 128, 4096, 5e-6, 1e-4, 1, "nf4"),
    # XLA gathers weights more slowly among all chips of a slice than among half: two copies.
    "llama-3.1-70b": Model("meta-llama/Llama-3.1-70B-Instruct", 256, 4096, 5e-6, 1e-4, 2, "nf4"),
}


def get_config(arg: str = "smollm2-135m") -> ml_collections.ConfigDict:
    name, _, option = (arg or "smollm2-135m").partition(",")
    if name not in MODELS or option not in ("", "lora"):
        raise ValueError(f"the argument must be one of {', '.join(MODELS)}; ',lora' may follow")
    model = MODELS[name]

    config = defaults.default()
    config.model.path = model.path
    config.model.remat = "none" if name == "smollm2-135m" else "layer"

    config.data.train = [{"path": "train.jsonl"}]
    config.data.eval = [{"path": "validation.jsonl"}]
    config.data.max_seq_length = model.max_seq_length
    config.train.batch_size = model.batch_size
    config.mesh.data = model.data_axis
    config.mesh.fsdp = 1 if model.data_axis == -1 else -1

    config.train.duration = "3 epochs"
    config.train.optimizer.learning_rate = model.learning_rate
    config.train.optimizer.schedule = "cosine"
    config.train.optimizer.final_lr_ratio = 0.1
    config.train.optimizer.warmup = "3%"
    config.eval.metrics = ["rougeL", "bleu", "exact_match"]
    config.eval.max_new_tokens = 256

    if option == "lora":
        config.model.quantize = model.lora_quantize
        config.model.lora.rank = 16
        config.model.lora.alpha = 32.0
        config.train.optimizer.learning_rate = model.lora_learning_rate
    return config
