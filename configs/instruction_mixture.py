"""LM-adapted T5 on the data sets of P3 under all of their templates, mixed as FLAN 2022 or T0 mixed theirs.

    jax-it train --config instruction_mixture --workdir runs/flan
    jax-it train --config instruction_mixture:flan --workdir runs/flan_tempered --config.data.mixing_temperature=2

The argument is `flan` or `t0`, and the folder of promptsource's templates, where that package is not installed:
`instruction_mixture:t0,promptsource/templates`. To mix your own data sets, copy this file and change DATA_SETS; the hub
serves some of these under other names by now.

flan (Chung et al. 2022, Longpre et al. 2023): a data set counts as having at most 3,000 examples, and each example is
drawn with one of its templates, half of the time with up to five other examples of the data set before it.
t0 (Sanh et al. 2022): each template of a data set counts as a data set of its own, of at most 500,000 examples divided
by the number of these templates.

More groups of data sets, in given shares, are written with data.mixing="weights" and a `weight` for each data set.
"""

from typing import Any

import ml_collections

from jax_it import config as defaults
from jax_it.data import promptsource

# What T0 was trained on, by kind of task: a name on the hub, and a subset where there are several.
DATA_SETS = [
    # multiple-choice questions
    "commonsense_qa", "dream", "quail", "quartz", "social_i_qa", "wiqa", "cosmos_qa", "qasc", "quarel", "sciq",
    "cos_e/v1.11", "wiki_hop/original",
    # extractive and closed-book questions
    "adversarial_qa/dbidaf", "adversarial_qa/dbert", "adversarial_qa/droberta", "quoref", "ropes", "duorc/SelfRC",
    "duorc/ParaphraseRC", "kilt_tasks/hotpotqa", "wiki_qa",
    # structure to text
    "common_gen", "wiki_bio",
    # sentiment
    "amazon_polarity", "app_reviews", "imdb", "rotten_tomatoes", "yelp_review_full",
    # summarization
    "cnn_dailymail/3.0.0", "gigaword", "multi_news", "samsum", "xsum",
    # topic classification
    "ag_news", "dbpedia_14", "trec",
    # paraphrase identification
    "glue/mrpc", "glue/qqp", "paws/labeled_final",
]  # fmt: skip
FLAN_CAP, T0_CAP = 3_000, 500_000


def get_config(arg: str = "flan") -> ml_collections.ConfigDict:
    mixture, _, folder = (arg or "flan").partition(",")
    if mixture not in ("flan", "t0"):
        raise ValueError("the argument must begin with flan or t0")

    config = defaults.default()
    config.model.path = "google/t5-base-lm-adapt"
    config.data.max_source_length = 1024
    config.data.max_target_length = 256
    config.data.max_truncated = 0.9  # of a data set's examples: some have whole articles
    config.data.mixing = "proportional"
    config.train.optimizer.name = "adafactor"
    config.train.optimizer.schedule = "constant"
    if mixture == "flan":
        config.data.train = [source(name, folder) for name in DATA_SETS]
        config.data.mixing_cap = FLAN_CAP
        config.train.duration = "38000 steps"
        config.train.batch_size = 64
        config.train.optimizer.learning_rate = 5e-4
        config.model.dropout = 0.05
    else:
        config.data.train = [each for name in DATA_SETS for each in by_template(name, folder)]
        config.train.duration = "12200 steps"
        config.train.batch_size = 1024
        config.train.optimizer.learning_rate = 1e-3
        config.model.dropout = 0.1
    return config


def source(name: str, folder: str) -> dict[str, Any]:
    """Return a data set with all of its templates, without examples before the prompt and with five."""
    path, _, subset = name.partition("/")
    template = f"promptsource:{folder}/{name}" if folder else f"promptsource:{name}"
    return {"path": path, "subset": subset, "name": name, "template": [template], "num_fewshot": [0, 5]}


def by_template(name: str, folder: str) -> list[dict[str, Any]]:
    """Return a data set once for each of its templates, as T0 has it."""
    whole = source(name, folder) | {"num_fewshot": [0]}
    templates = [template.name for template in promptsource.expand(whole["template"], f"data set {name}")]
    return [whole | {"template": [one], "mixing_cap": T0_CAP // len(templates)} for one in templates]
