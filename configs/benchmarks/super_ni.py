"""Super-NaturalInstructions in Tk-Instruct's setting: definition and two positive examples (Wang et al. 2022).

    git clone https://github.com/allenai/natural-instructions
    jax-it eval --model allenai/tk-instruct-3b-def-pos \\
        --config configs/benchmarks/super_ni.py:natural-instructions --output scores/super_ni

The argument is the folder of that repository (Apache license; the default is natural-instructions). The first 100
instances of each of the 119 tasks in splits/default/test_tasks.txt are scored by ROUGE-L with stemming, overall and
for each category. A prompt longer than 1024 tokens loses its second example, then its first, and is then cut at its
end, as in Tk-Instruct ("truncated" counts those that are cut).

To reproduce: Tk-Instruct 3B 54.33, 11B 60.07, ROUGE-L over all (the table of github.com/yizhongw/Tk-Instruct, on the
current instances of the repository; the first version of the paper used others).

To train in the same way, give data.train a source like `data` below, with splits/default/train_tasks.txt and, as
Tk-Instruct did, the first 100 instances of each task.
"""

import ml_collections

from jax_it import config as defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    folder = arg or "natural-instructions"
    config = defaults.default()
    config.eval.tasks = [
        {
            "name": "super_ni",
            "data": {
                "path": f"{folder}/tasks",
                "format": "json",
                "file_list": f"{folder}/splits/default/test_tasks.txt",
                "records": "Instances",
                "max_per_file": 100,
                "template": ["super_ni", "super_ni_1_example", "super_ni_definition"],
            },
            "chat": False,
            "max_prompt_length": 1024,
            "truncate": "end",
            "metrics": ["rougeL", "squad_exact_match"],
            "max_new_tokens": 128,
            "group_by": "Categories",
            "published": "ROUGE-L: Tk-Instruct 3B 54.33, 11B 60.07 (github.com/yizhongw/Tk-Instruct)",
        }
    ]
    return config
