"""Mixtral (Jiang et al. 2024): Mistral, with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.experts import Experts
from jax_it.models.families import llama
from jax_it.models.weights import WeightSpec


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, kv_heads=8, epsilon=1e-5, special_tokens=(1, 2, None))
    window = llama.read_window(reader)
    reader.expect(router_jitter_noise=0.0)
    # Of the other scalings Transformers makes no model without a head_dim.
    kinds = tuple(rope.KEYS) if reader.has("head_dim") else ("default", "linear", "llama3")
    config = CausalLMConfig(
        **common,
        layer_kinds=(LayerKind(window, rope.read(reader, common["head_dim"], theta=1e6, kinds=kinds)),),
        experts=read_experts(reader, "num_local_experts", 8, 2, common["mlp_dim"], normalized=True),
    )
    reader.finish()
    return config


def read_experts(
    reader: ConfigReader, key: str, number: int, per_token: int, mlp_dim: int, *, normalized: bool
) -> Experts:
    """Read the experts of a layer, whose number is under `key`; numbers are the family's defaults."""
    number, per_token = reader.size(key, number), reader.size("num_experts_per_tok", per_token)
    if per_token > number:
        raise reader.bad("num_experts_per_tok", f"it must be at most {key}, {number}")
    return Experts(number, per_token, mlp_dim, normalized)


def weight_table(c: CausalLMConfig) -> dict[str, WeightSpec]:
    moe = "model.layers.{L}.block_sparse_moe"
    return llama.weight_table(c) | {
        "layers.experts.router": WeightSpec("L D X", f"{moe}.gate.weight", "X D"),
        "layers.experts.gate": WeightSpec("L X D F", f"{moe}.experts.{{X}}.w1.weight", "F D"),
        "layers.experts.up": WeightSpec("L X D F", f"{moe}.experts.{{X}}.w3.weight", "F D"),
        "layers.experts.down": WeightSpec("L X F D", f"{moe}.experts.{{X}}.w2.weight", "D F"),
    }


MIXTRAL = llama.make_family("MixtralForCausalLM", read_config, weight_table)
