"""IFEval: 541 prompts with instructions that a program can check, as "no commas" (Zhou et al. 2023).

    pip install 'jax-it[ifeval]'
    jax-it eval --model HuggingFaceTB/SmolLM2-1.7B-Instruct --config configs/benchmarks/ifeval.py --output scores/ifeval
    jax-it eval --workdir runs/mine --config configs/benchmarks/ifeval.py:data/input_data.jsonl

Data: google/IFEval of the hub (Apache licence), or the argument: input_data.jsonl of instruction_following_eval in
github.com/google-research/google-research. The checks are the authors', in the copy of the Language Model Evaluation
Harness; NLTK downloads a small file for them once.

"ifeval" is the mean of the strict accuracies of prompts and of instructions, as model cards give it; the four others
are the paper's. To reproduce: SmolLM2-135M-Instruct 29.9, 360M 41.0, 1.7B 56.7 (their model cards, "average
prompt/inst"); Llama 3.1 8B Instruct 80.4 (its model card; the loose accuracies are in that mean).
"""

import ml_collections

from jax_it import config as defaults

TEMPLATE = "{{prompt}} ||| {{ {'instruction_id_list': instruction_id_list, 'kwargs': kwargs} | tojson }}"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = defaults.default()
    data = {"path": arg} if arg else {"path": "google/IFEval", "split": "train", "format": "datasets"}
    config.eval.tasks = [
        {
            "name": "ifeval",
            "data": data | {"template": [TEMPLATE]},
            "max_prompt_length": 4096,
            "metrics": [
                "ifeval",
                "ifeval.prompt_strict",
                "ifeval.instruction_strict",
                "ifeval.prompt_loose",
                "ifeval.instruction_loose",
            ],
            "max_new_tokens": 1280,
            "published": "SmolLM2-135M-Instruct 29.9, 360M 41.0, 1.7B 56.7 (their model cards)",
        }
    ]
    return config
