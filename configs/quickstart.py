"""The quickstart: a small T5 from random weights on the built-in instructions, in a few minutes on two CPU cores.

    jax-it train --config quickstart --workdir runs/quickstart

It needs no download: the data is generated, and the tokenizer is trained on it.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.pretrained = False
    config.model.tokenizer = "train"
    config.model.tokenizer_size = 640
    config.model.architecture = {
        "model_type": "t5",
        "vocab_size": 640,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }

    data = {"path": "builtin:instructions", "name": "instructions"}
    config.data.train = [{**data, "split": "train"}]
    config.data.eval = [{**data, "split": "test"}]
    config.data.max_source_length = 64
    config.data.max_target_length = 32

    config.train.duration = "3 epochs"
    config.train.batch_size = 64
    config.train.optimizer.name = "adamw"
    config.train.optimizer.learning_rate = 2e-3
    config.train.optimizer.schedule = "linear"
    config.train.optimizer.warmup = "60 steps"
    config.train.checkpoint_every = "200 steps"

    config.eval.at_start = True
    config.eval.every = "300 steps"
    config.eval.metrics = ["rougeL", "bleu", "exact_match"]
    return config
