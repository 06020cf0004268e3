"""T5 1.1 small on T0's prompted data sets: the main job, at 512 source and 128 target tokens.

    jax-it train --config configs/t0_t5_small.py --workdir runs/t0

reads `data/t0/train.jsonl.gz`, lines of {task, prompt, completion}; --config.data.train.0.path=FILE names
another. `configs/t0_t5_small.py:random` starts from random weights, which need no download but that of the
tokenizer (--config.model.tokenizer=FILE names T5's spiece.model).
"""

import ml_collections

from jax_it import config as defaults

T5_V1_1_SMALL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    config.model.tokenizer = "google/t5-v1_1-small"
    if arg == "random":
        config.model.pretrained = False
        config.model.architecture = T5_V1_1_SMALL
    elif not arg:
        config.model.path = "google/t5-v1_1-small"
    else:
        raise ValueError("the argument may be 'random' or nothing")

    config.data.train = [{"path": "data/t0/train.jsonl.gz", "name": "t0"}]
    config.data.validation_size = 500
    config.data.max_source_length = 512
    config.data.max_target_length = 128

    config.train.duration = "3 epochs"
    config.train.batch_size = 128
    config.train.optimizer.name = "adafactor"
    config.train.optimizer.learning_rate = 1e-3
    config.train.optimizer.schedule = "constant"
    config.train.optimizer.warmup = "1000 steps"
    config.train.checkpoint_every = "200 steps"
    return config
