"""Mistral (Jiang et al. 2023): Llama, with a sliding window in every layer."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.families import llama
from jax_it.models.settings import Settings
from jax_it.models.transformer import Config


def read_config(values: Mapping[str, Any], where: str) -> Config:
    settings = Settings(values, where)
    common = llama.read_common(settings)
    window = settings.get("sliding_window", int, 0)
    if "sliding_window" not in values:
        window = 4096  # Transformers' default; null means none
    config = Config(
        **common,
        ropes=(rope.read(settings, common["head_size"]),),
        windows=(window,) * common["layers"] if window else (),
    )
    settings.finish()
    return config


MISTRAL = llama.make_family("MistralForCausalLM", read_config)
