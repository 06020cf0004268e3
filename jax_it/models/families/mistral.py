"""Mistral (Jiang et al. 2023): Llama, with a sliding window in every layer."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.families import llama
from jax_it.models.settings import Settings


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    settings = Settings(values, where)
    common = llama.read_common(settings, kv_heads=8, marks=(1, 2, None))
    window = llama.read_window(settings, 4096)
    config = CausalLMConfig(
        **common,
        layer_kinds=(LayerKind(window, rope.read(settings, common["head_dim"])),),
    )
    settings.finish()
    return config


MISTRAL = llama.make_family("MistralForCausalLM", read_config)
