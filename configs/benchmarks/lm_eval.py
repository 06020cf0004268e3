"""Tasks of the Language Model Evaluation Harness (lm_eval), with its own prompts and scores.

    pip install 'jax-it[harness]'
    jax-it eval --model google/flan-t5-xl --config configs/benchmarks/lm_eval.py:mmlu --output scores/mmlu
    jax-it eval --workdir runs/mine --config configs/benchmarks/lm_eval.py:gsm8k_cot,ifeval,chat

The argument is a list, separated by commas, of tasks or groups of tasks (`lm_eval ls tasks` shows them). It may also
contain the number of few-shot examples, in place of the task's own (MMLU is 5-shot with `lm_eval.py:mmlu,5`), and
"chat" for prompts in the model's chat template. The data sets are downloaded from the hub. Metrics such as "acc,none"
are from 0 to 1. Prompts are truncated at their start to the length in the model's config.json. For T5 that is 512
tokens, but T5 can read more: add --config.eval.tasks.0.max_prompt_length=2048.

To reproduce (as published; other prompts differ by a few points):
  mmlu, 5-shot     Flan-T5-XL 49.2, Flan-T5-XXL 54.5, LLaMA-7B 35.2 (Chia et al. 2023)
  gsm8k_cot        Llama 2 7B 14.6, 13B 28.7, 70B 56.8 (Touvron et al. 2023; 8-shot)
  bbh_cot_fewshot  Flan-T5-XL 35.2, Flan-T5-XXL 41.4 (Chung et al. 2022; 3-shot)
  ifeval, chat     SmolLM2-135M-Instruct 29.9, 360M 41.0, 1.7B 56.7 (their model cards: mean of the strict accuracies)
"""

import ml_collections

from jax_it import config as defaults

PUBLISHED = {
    "mmlu": "Flan-T5-XL 49.2, Flan-T5-XXL 54.5, LLaMA-7B 35.2 (Chia et al. 2023)",
    "gsm8k_cot": "Llama 2 7B 14.6, 13B 28.7, 70B 56.8 (Touvron et al. 2023)",
    "bbh_cot_fewshot": "Flan-T5-XL 35.2, Flan-T5-XXL 41.4 (Chung et al. 2022)",
    "ifeval": "SmolLM2-135M-Instruct 29.9, 360M 41.0, 1.7B 56.7 (their model cards)",
}


def get_config(arg: str = "mmlu") -> ml_collections.ConfigDict:
    words = [word for word in (arg or "mmlu").split(",") if word]
    num_fewshot = next((int(word) for word in words if word.isdecimal()), 0)
    config = defaults.default()
    config.eval.tasks = [
        {
            "name": name,
            "score": "lm_eval",
            "num_fewshot": num_fewshot,
            "chat": "chat" in words,
            "published": PUBLISHED.get(name, ""),
        }
        for name in words
        if name != "chat" and not name.isdecimal()
    ]
    return config
