"""Granite (IBM 2024): Llama, with four multipliers: of embeddings, attention scores, residuals and logits."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, special_tokens=(1, 2, None))
    config = CausalLMConfig(
        **common,
        **llama.read_bias(reader),
        mlp_bias=reader.get("mlp_bias", bool, False),
        layer_kinds=(LayerKind(rope=rope.read(reader, common["head_dim"])),),
        attn_scale=reader.positive("attention_multiplier", 1.0),
        embedding_scale=reader.positive("embedding_multiplier", 1.0),
        residual_scale=reader.positive("residual_multiplier", 1.0),
        output_scale=1 / reader.positive("logits_scaling", 1.0),
    )
    reader.finish()
    return config


GRANITE = llama.make_family("GraniteForCausalLM", read_config)
