"""GLM-4 (GLM team 2024): half of each head rotates, in neighbouring pairs; norms before and after each sublayer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama, phi3
from jax_it.models.weights import WeightSpec

EOS_TOKEN_IDS = (151329, 151336, 151338)
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, kv_heads=2, head_dim=128, epsilon=1.5625e-7, special_tokens=(None, None, 151329))
    if not common["eos_token_ids"]:
        common["eos_token_ids"] = tuple(token for token in EOS_TOKEN_IDS if token < common["vocab_size"])
    rotation = rope.read(reader, common["head_dim"], share=0.5)
    config = CausalLMConfig(
        **common,
        norm_placement="sandwich_norm",
        attention_bias=reader.get("attention_bias", bool, True),
        layer_kinds=(LayerKind(rope=dataclasses.replace(rotation, interleaved=True)),),
    )
    reader.finish()
    return config


def weight_table(c: CausalLMConfig) -> dict[str, WeightSpec]:
    return llama.weight_table(c, NORMS) | phi3.gate_up_weights(c, "model.layers.{L}.mlp")


GLM4 = llama.make_family("Glm4ForCausalLM", read_config, weight_table)
