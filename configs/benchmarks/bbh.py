"""BIG-Bench Hard: 27 tasks of reasoning, 3-shot with chains of thought (Suzgun et al. 2022).

    git clone https://github.com/suzgunmirac/BIG-Bench-Hard
    jax-it eval --model google/flan-t5-xl --config configs/benchmarks/bbh.py:BIG-Bench-Hard --output scores/bbh

The argument is the folder of that repository (MIT licence; the default is BIG-Bench-Hard), whose bbh/ holds the
questions and cot-prompts/ the three examples that stand before them. An answer is right if what follows "the answer
is", to the end of the line without the full stop, is the target.

To reproduce: Flan-T5-XL 35.2, Flan-T5-XXL 41.4, code-davinci-002 73.9 (Chung et al. 2022 and Suzgun et al. 2022, chain
of thought): means over the tasks, "exact_match_macro" here.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    folder = arg or "BIG-Bench-Hard"
    config = defaults.default()
    config.eval.tasks = [
        {
            "name": "bbh",
            "data": {
                "path": f"{folder}/bbh",
                "format": "json",
                "records": "examples",
                "template": ["Q: {{input}}\nA: Let's think step by step. ||| {{target}}"],
            },
            "description_file": f"{folder}/cot-prompts/{{{{task}}}}.txt",
            "chat": False,
            "max_prompt_length": 4096,
            "metrics": ["exact_match"],
            "answer": r"[Tt]he answer is (.*?)\.?(?:\n|$)",
            "max_new_tokens": 512,
            "stop": ["Q:", "\n\n"],
            "group_by": "task",
            "published": "chain of thought: Flan-T5-XL 35.2, Flan-T5-XXL 41.4 (Chung et al. 2022)",
        }
    ]
    return config
