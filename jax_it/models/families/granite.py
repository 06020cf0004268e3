"""Granite (IBM 2024): Llama, with four multipliers: of embeddings, attention scores, residuals and logits."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.families import llama
from jax_it.models.settings import Settings


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    settings = Settings(values, where)
    common = llama.read_common(settings, marks=(1, 2, None))
    config = CausalLMConfig(
        **common,
        **llama.read_bias(settings),
        mlp_bias=settings.get("mlp_bias", bool, False),
        layer_kinds=(LayerKind(rope=rope.read(settings, common["head_dim"])),),
        attn_scale=settings.positive("attention_multiplier", 1.0),
        embedding_scale=settings.positive("embedding_multiplier", 1.0),
        residual_scale=settings.positive("residual_multiplier", 1.0),
        output_scale=1 / settings.positive("logits_scaling", 1.0),
    )
    settings.finish()
    return config


GRANITE = llama.make_family("GraniteForCausalLM", read_config)
