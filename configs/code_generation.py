"""Code generation: ByT5-base on MBPP, a Python function for a description. Bytes keep line breaks and braces.

    jax-it train --config code_generation --workdir runs/code_generation
    jax-it eval --workdir runs/code_generation

T5's own vocabulary turns braces into <unk> and line breaks into spaces; see the `unknown` line of
`jax-it preview` before you train a T5 on code.
"""

import ml_collections

from jax_it import config as defaults

TEMPLATE = "{{text}}\nIt must pass: {{test_list[0]}} ||| {{code}}"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.path = "google/byt5-base"

    data = {"path": "google-research-datasets/mbpp", "subset": "full", "format": "datasets", "template": [TEMPLATE]}
    config.data.train = [{**data, "split": "train", "name": "mbpp"}]
    config.data.eval = [{**data, "split": "validation", "name": "mbpp"}]
    config.data.max_source_length = 512
    config.data.max_target_length = 512

    config.train.duration = "20 epochs"
    config.train.batch_size = 32
    config.train.optimizer.name = "adamw"
    config.train.optimizer.learning_rate = 3e-4
    config.train.optimizer.schedule = "wsd"
    config.train.optimizer.warmup = "20 steps"
    config.train.optimizer.decay = "20%"
    config.train.optimizer.weight_decay = 0.01
    config.train.checkpoint_every = "50 steps"
    config.eval.every = "50 steps"
    config.eval.best = "chrf"
    config.eval.metrics = ["exact_match", "chrf", "bleu"]
    return config
