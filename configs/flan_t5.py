"""Flan-T5-XL (3B), Flan-T5-XXL (11B) or Flan-UL2 (20B) on your own instructions: 3 epochs, AdamW or LoRA.

    jax-it plan --config flan_t5:xxl --topology v5e:8x8
    jax-it train --config flan_t5:xl --workdir runs/flan_t5_xl \\
        --config.data.train.0.path=train.jsonl --config.data.eval.0.path=validation.jsonl
    jax-it train --config flan_t5:xxl,128 --workdir runs/flan_t5_xxl
    jax-it train --config flan_t5:xl,lora --workdir runs/flan_t5_xl_lora

The argument is `xl`, `xxl` or `ul2`, and the number of devices (8 for xl, else 64 chips of a TPU v5e), each of which
trains 16 examples a step. Weights, gradients and optimizer state take 16 bytes a parameter, 46 GB for xl, 180 GB for
xxl and 310 GB for ul2; mesh.fsdp splits them over the devices. With `lora`, 0.3 % of the weights are trained, above
2 bytes a parameter in bfloat16 (5.7 GB for xl), 64 examples a step.
"""

import ml_collections

from jax_it import config as defaults

MODELS = {  # name on the hub, devices, warmup
    "xl": ("google/flan-t5-xl", 8, "500 steps"),
    "xxl": ("google/flan-t5-xxl", 64, "3%"),
    "ul2": ("google/flan-ul2", 64, "3%"),
}


def get_config(arg: str = "xl") -> ml_collections.ConfigDict:
    name, _, option = (arg or "xl").partition(",")
    if name not in MODELS:
        raise ValueError(f"the argument must begin with one of {', '.join(MODELS)}")
    path, devices, warmup = MODELS[name]

    config = defaults.default()
    config.model.path = path
    config.model.remat = "layer"

    config.data.train = [{"path": "train.jsonl"}]
    config.data.eval = [{"path": "validation.jsonl"}]
    config.data.max_source_length = 512
    config.data.max_target_length = 128

    config.train.duration = "3 epochs"
    config.train.optimizer.name = "adamw"
    config.train.optimizer.schedule = "linear"
    if option == "lora":
        config.model.lora.rank = 16
        config.model.lora.alpha = 32.0
        config.model.lora.targets = ["q", "v"]
        config.model.lora.dropout = 0.05
        config.train.batch_size = 64
        config.train.optimizer.learning_rate = 3e-4
        config.train.optimizer.warmup = "3%"
    else:
        config.train.batch_size = 16 * int(option or devices)
        config.train.optimizer.learning_rate = 5e-5
        config.train.optimizer.warmup = warmup
        config.train.optimizer.weight_decay = 0.01
        config.mesh.data = 1
        config.mesh.fsdp = -1
    return config
