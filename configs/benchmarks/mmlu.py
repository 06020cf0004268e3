"""MMLU: multiple choice questions of 57 subjects, 5-shot (Hendrycks et al. 2021).

    jax-it eval --model google/flan-t5-xl --config configs/benchmarks/mmlu.py --output scores/mmlu
    jax-it eval --workdir runs/mine --config configs/benchmarks/mmlu.py:data/mmlu

Data: cais/mmlu of the hub (MIT licence), or the argument: a folder with test.jsonl and dev.jsonl, whose records have
question, choices, answer (from 0) and subject. The prompt is that of the authors' code, with the five questions of the
subject's dev split before it; as there, shots are left out where it is longer than 2048 tokens ("truncated" counts
these). The likeliest of the letters A to D is the answer.

To reproduce: Flan-T5-XL 49.2, Flan-T5-XXL 54.5, LLaMA-7B 35.2 (Chia et al. 2023, InstructEval, whose code is the
authors'). Those are shares of all questions, "accuracy" here; "accuracy_macro" is the mean over subjects, as other
papers have it.
"""

import ml_collections

from jax_it import config as defaults

QUESTION = (
    "{{question}}\n"
    "{% for choice in choices %}{{'ABCD'[loop.index0]}}. {{choice}}\n{% endfor %}"
    "Answer: ||| {{'ABCD'[answer]}}"
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    def source(split: str) -> dict:
        if arg:
            return {"path": f"{arg}/{split}.jsonl", "template": [QUESTION]}
        return {"path": "cais/mmlu", "subset": "all", "split": split, "format": "datasets", "template": [QUESTION]}

    config = defaults.default()
    config.eval.tasks = [
        {
            "name": "mmlu",
            "data": source("test"),
            "score": "multiple_choice",
            "options": "A ||| B ||| C ||| D",
            "description": "The following are multiple choice questions (with answers) about "
            "{{subject | replace('_', ' ')}}.",
            "fewshot": source("dev"),
            "num_fewshot": 5,
            "fewshot_by": "subject",
            "chat": False,
            "max_prompt_length": 2048,
            "truncate": "fewshot",
            "group_by": "subject",
            "published": "Flan-T5-XL 49.2, Flan-T5-XXL 54.5, LLaMA-7B 35.2 (Chia et al. 2023)",
        }
    ]
    return config
