"""The ways of decoding that are compared with Transformers' `generate`, on several prompts of some families' models.

Settings are those of `Sampling`. Texts end at more tokens than the model's own, so that they have many lengths.
"""

import zlib
from typing import Any

import numpy as np

from tests.parity.case import Case

CASES = ("t5_1_1", "mt5", "llama3", "qwen3", "gemma2")
LENGTH = 16  # new tokens
MORE_ENDS = (17, 18, 19)
# Of the prompts: such that no text changes if logits do by many float32 errors.
SEEDS = {"t5_1_1": 0, "mt5": 0, "llama3": 1, "qwen3": 4, "gemma2": 0}

Settings = dict[str, Any]
BEAMS: dict[str, Settings] = {
    f"beams_{beams}_{penalty:g}{'_early' * early}": {
        "num_beams": beams, "length_penalty": penalty, "early_stopping": early,
    }
    for beams in (2, 4, 5)
    for penalty in (0.6, 1.0, 2.0)
    for early in (False, True)
}  # fmt: skip
NEVER: dict[str, Settings] = {
    f"beams_4_{penalty:g}_never": {"num_beams": 4, "length_penalty": penalty, "early_stopping": "never"}
    for penalty in (-0.5, 1.0, 2.0)
}
RULES: dict[str, Settings] = {
    "repetition": {"repetition_penalty": 1.5},
    "reward": {"repetition_penalty": 0.8},
    "minimum": {"min_new_tokens": 6},
    "forced": {"forced_bos_token": 20},
    "all": {"repetition_penalty": 1.3, "min_new_tokens": 5, "forced_bos_token": 21},
}
SETTINGS: dict[str, Settings] = {
    "plain": {},
    **BEAMS,
    **NEVER,
    **RULES,
    **{f"{name}_beams": {**settings, "num_beams": 3} for name, settings in RULES.items()},
}
# What `make test` compares, each way of decoding with some model; the others are for make test-slow.
QUICK = {
    ("t5_1_1", "beams_4_1"), ("t5_1_1", "all"), ("mt5", "forced_beams"), ("mt5", "beams_5_0.6_early"),
    ("llama3", "beams_2_2"), ("llama3", "repetition"), ("llama3", "all_beams"), ("qwen3", "repetition_beams"),
    ("qwen3", "beams_4_2_early"), ("gemma2", "minimum_beams"), ("gemma2", "beams_5_1"), ("llama3", "beams_4_1_never"),
}  # fmt: skip


def prompts(case: Case) -> list[list[int]]:
    """Of unequal lengths; an encoder-decoder's have its end mark."""
    rng = np.random.RandomState(zlib.crc32(case.name.encode()) + SEEDS[case.name])
    mark = case.end_tokens[:1] if case.values.get("is_encoder_decoder") else []
    return [[*rng.randint(5, 96, length).tolist(), *mark] for length in (1, 3, 4, 7, 9, 12, 17, 20, 26, 30)]


def ends(case: Case) -> list[int]:
    return [*case.end_tokens, *MORE_ENDS]
