"""OLMo 2 (OLMo team 2024): Llama, with norms after attention and feed-forward, and of all queries and keys."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, epsilon=1e-5, special_tokens=(None, 50279, 1))
    config = CausalLMConfig(
        **common,
        norm_placement="post_norm",
        qk_norm="all_heads",
        **llama.read_bias(reader),
        layer_kinds=(LayerKind(rope=rope.read(reader, common["head_dim"])),),
    )
    reader.finish()
    return config


OLMO2 = llama.make_family("Olmo2ForCausalLM", read_config)
