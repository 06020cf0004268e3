"""GSM8K: word problems of grade school, 8-shot with chains of thought (Cobbe et al. 2021, Wei et al. 2022).

    jax-it eval --model meta-llama/Llama-2-7b-hf --config configs/benchmarks/gsm8k.py --output scores/gsm8k
    jax-it eval --workdir runs/mine --config configs/benchmarks/gsm8k.py:data/gsm8k

Data: openai/gsm8k of the hub (MIT licence), or the argument: a folder with train.jsonl and test.jsonl, whose records
have question and answer. The shots are the first eight problems of the training split with their solutions, without
the calculator's marks; an answer is right if the last number of the text, or the first behind "####", is that of the
reference.

To reproduce: Llama 2 7B 14.6, 13B 28.7, 70B 56.8 (Touvron et al. 2023), whose eight shots are those of Wei et al.;
SmolLM2-135M 1.4 (its model card, 5-shot). With other shots expect a few points of difference.
"""

import ml_collections

from jax_it import config as defaults

PROBLEM = "Question: {{question}}\nAnswer: ||| {{answer}}"
# A shot's solution without "<<48/2=24>>", which only those who were trained on it can use.
SOLVED = (
    "Question: {{question}}\nAnswer: ||| "
    "{% for part in answer.split('<<') %}{{part if loop.first else part.split('>>', 1)[-1]}}{% endfor %}"
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    def source(split: str, template: str) -> dict:
        if arg:
            return {"path": f"{arg}/{split}.jsonl", "template": [template]}
        return {"path": "openai/gsm8k", "subset": "main", "split": split, "format": "datasets", "template": [template]}

    config = defaults.default()
    config.eval.tasks = [
        {
            "name": "gsm8k",
            "data": source("test", PROBLEM),
            "fewshot": source("train", SOLVED) | {"limit": 8},
            "num_fewshot": 8,
            "chat": False,
            "max_prompt_length": 4096,
            "metrics": ["final_number"],
            "max_new_tokens": 256,
            "stop": ["Question:", "\n\n"],
            "published": "Llama 2 7B 14.6, 13B 28.7, 70B 56.8 (Touvron et al. 2023)",
        }
    ]
    return config
