"""OLMo 2 (OLMo team 2024): Llama, with norms after attention and feed-forward, and of all queries and keys."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.families import llama
from jax_it.models.settings import Settings


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    settings = Settings(values, where)
    common = llama.read_common(settings, epsilon=1e-5, marks=(None, 50279, 1))
    config = CausalLMConfig(
        **common,
        norm_placement="post_norm",
        qk_norm="all_heads",
        **llama.read_bias(settings),
        layer_kinds=(LayerKind(rope=rope.read(settings, common["head_dim"])),),
    )
    settings.finish()
    return config


OLMO2 = llama.make_family("Olmo2ForCausalLM", read_config)
