"""T5 1.1 small on data sets prompted as T0's were (Sanh et al. 2022): 512 source and 128 target tokens.

    jax-it train --config t0_t5_small --workdir runs/t0
    jax-it train --config t0_t5_small:random --workdir runs/t0_random

It downloads one prompt of each of T0's eight kinds of task from bigscience/P3, at most 20,000 examples each; TASKS may
name any of the 660 subsets there. `random` starts from random weights (--config.model.tokenizer=FILE names a copy of
T5's spiece.model). To train on a file of your own, with lines of {prompt, completion}:

    jax-it train --config t0_t5_small --workdir runs/mine --config.data.train='[{"path": "train.jsonl.gz"}]'
"""

import ml_collections

from jax_it import config as defaults

TASKS = [
    "ag_news_classify_question_first",  # topic classification
    "imdb_Reviewer_Expressed_Sentiment",  # sentiment
    "glue_mrpc_same_thing",  # paraphrase identification
    "xsum_DOC_tldr",  # summarization
    "common_gen_Put_together",  # structure to text
    "sciq_Multiple_Choice",  # multiple-choice questions
    "kilt_tasks_hotpotqa_final_exam",  # closed-book questions
    "ropes_plain_background_situation",  # extractive questions
]
TEMPLATE = "{{inputs_pretokenized}} ||| {{targets_pretokenized}}"

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

    config.data.train = [
        {
            "path": "bigscience/P3",
            "subset": task,
            "name": task,
            "format": "datasets",
            "template": [TEMPLATE],
            "limit": 20000,
        }
        for task in TASKS
    ]
    config.data.validation_size = 100  # of each task
    config.data.max_source_length = 512
    config.data.max_target_length = 128
    config.data.max_truncated = 0.7  # of each task's examples; news articles are long

    config.train.duration = "3 epochs"
    config.train.batch_size = 128
    config.train.optimizer.name = "adafactor"
    config.train.optimizer.learning_rate = 1e-3
    config.train.optimizer.schedule = "constant"
    config.train.optimizer.warmup = "1000 steps"
    config.train.checkpoint_every = "200 steps"
    return config
