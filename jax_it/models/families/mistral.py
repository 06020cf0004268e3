"""Mistral (Jiang et al. 2023): Llama, with a sliding window in every layer."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, kv_heads=8, special_tokens=(1, 2, None))
    window = llama.read_window(reader, 4096)
    config = CausalLMConfig(
        **common,
        layer_kinds=(LayerKind(window, rope.read(reader, common["head_dim"])),),
    )
    reader.finish()
    return config


MISTRAL = llama.make_family("MistralForCausalLM", read_config)
