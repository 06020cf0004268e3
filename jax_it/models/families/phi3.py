"""Phi-3 and Phi-4: Llama, with queries, keys and values in one tensor, and gate and up in another."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama
from jax_it.models.weights import WeightSpec


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, epsilon=1e-5, special_tokens=(1, 32000, 32000))
    reader.expect(resid_pdrop=0.0, embd_pdrop=0.0, attention_bias=False, mlp_bias=False, lm_head_bias=False)
    window = llama.read_window(reader)
    rotation = rope.read(reader, common["head_dim"], share=1.0, original=4096, kinds=("default", "longrope"))
    config = CausalLMConfig(
        **common,
        layer_kinds=(LayerKind(window, rotation),),
        recompute_longrope=True,
    )
    # The code of its own that a checkpoint brings computes what this family does.
    reader.finish(ignored=("auto_map", "full_attn_mod", "interpolate_factor"))
    return config


def weight_table(c: CausalLMConfig) -> dict[str, WeightSpec]:
    layer = "model.layers.{L}"
    qkv = f"{layer}.self_attn.qkv_proj.weight"
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return (
        llama.weight_table(c)
        | {
            "layers.attention.query": WeightSpec("L D N H", qkv, f"(N H)+{2 * keys} D"),
            "layers.attention.key": WeightSpec("L D K H", qkv, f"{queries}+(K H)+{keys} D"),
            "layers.attention.value": WeightSpec("L D K H", qkv, f"{queries + keys}+(K H) D"),
        }
        | gate_up_weights(c, f"{layer}.mlp")
    )


def gate_up_weights(c: CausalLMConfig, mlp: str) -> dict[str, WeightSpec]:
    """Return the two weights that one tensor of a feed-forward layer holds."""
    name = f"{mlp}.gate_up_proj.weight"
    return {
        "layers.mlp.gate": WeightSpec("L D F", name, f"F+{c.mlp_dim} D"),
        "layers.mlp.up": WeightSpec("L D F", name, f"{c.mlp_dim}+F D"),
    }


PHI3 = llama.make_family("Phi3ForCausalLM", read_config, weight_table)
