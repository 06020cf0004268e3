"""Gemma 1, 2 and 3 (text): norms scaled by 1 + w, scaled embeddings.

Gemma 2 has capped scores and logits, norms on both sides, and a window in every second layer; Gemma 3 has
norms of queries and keys, and five layers with a window and a rope of their own to one without.
"""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind, shortest_period
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama

TANH = "gelu_pytorch_tanh"


def _read_common(reader: ConfigReader, act: str, kv_heads: int, whole_heads: bool) -> dict[str, Any]:
    """Read what all three share, as arguments of `CausalLMConfig`."""
    common = llama.read_common(
        reader,
        tied=True,
        act=(act, TANH),
        kv_heads=kv_heads,
        head_dim=256,
        special_tokens=(2, 1, 0),
        whole_heads=whole_heads,
    )
    reader.expect(use_bidirectional_attention=False)
    return common | {
        "norm": "rms_plus_one",
        "embedding_scale": common["embed_dim"] ** 0.5,
        "embedding_init": common["embed_dim"] ** -0.5,
        **llama.read_bias(reader),
    }


def read_gemma(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    """Read Gemma 1's config.json, in which `gelu` has always meant the tanh approximation."""
    if values.get("hidden_act") == "gelu":
        values = {**values, "hidden_act": TANH}
    reader = ConfigReader(values, where)
    common = _read_common(reader, "hidden_act", kv_heads=16, whole_heads=False)
    reader.expect(hidden_activation=TANH)
    config = CausalLMConfig(**common, layer_kinds=(LayerKind(rope=rope.read(reader, common["head_dim"])),))
    reader.finish()
    return config


def _read_newer(reader: ConfigReader) -> dict[str, Any]:
    """Read what Gemma 2 and 3 share beyond that."""
    common = _read_common(reader, "hidden_activation", kv_heads=4, whole_heads=True)
    reader.expect(cache_implementation="hybrid", hidden_act=TANH)
    scalar = reader.size("query_pre_attn_scalar", 256)
    return common | {"norm_placement": "sandwich_norm", "attn_scale": scalar**-0.5}


def read_gemma2(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = _read_newer(reader)
    window, rotation = _read_window(reader), rope.read(reader, common["head_dim"])
    windows = llama.read_windows(reader, common["num_layers"], window, ("sliding_attention", "full_attention"))
    config = CausalLMConfig(
        **common,
        attn_logit_softcap=_cap(reader, "attn_logit_softcapping", 50.0),
        final_logit_softcap=_cap(reader, "final_logit_softcapping", 30.0),
        layer_kinds=shortest_period([LayerKind(window, rotation) for window in windows]),
    )
    reader.expect(sliding_window_size=window)
    reader.finish()
    return config


def _read_window(reader: ConfigReader) -> int:
    """Read `sliding_window`, without which Transformers computes no layer, whatever its kind."""
    if reader.is_null("sliding_window"):
        raise reader.bad("sliding_window", "it must be there")
    return llama.read_window(reader, 4096)


def _cap(reader: ConfigReader, key: str, default: float | None) -> float:
    """Read a soft cap; null means none, which is 0 to `CausalLMConfig`, and an absent key the family's default."""
    if not reader.has(key) and (default is None or reader.is_null(key)):
        return 0.0
    return reader.positive(key, default or 1.0)


def read_gemma3_text(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = _read_newer(reader)
    reader.expect(attn_logit_softcapping=0.0)  # which Transformers reads and does not apply
    pattern = reader.size("sliding_window_pattern", 6)
    windows = llama.read_windows(
        reader, common["num_layers"], _read_window(reader),
        ("sliding_attention",) * (pattern - 1) + ("full_attention",),
    )  # fmt: skip
    full, sliding = rope.read_by_layer_type(
        reader, common["head_dim"],
        full_theta=reader.positive("rope_theta", 1e6), sliding_theta=reader.positive("rope_local_base_freq", 1e4),
    )  # fmt: skip
    config = CausalLMConfig(
        **common,
        qk_norm="head",
        final_logit_softcap=_cap(reader, "final_logit_softcapping", None),
        layer_kinds=shortest_period([LayerKind(window, sliding if window else full) for window in windows]),
    )
    reader.finish()
    return config


GEMMA = llama.make_family("GemmaForCausalLM", read_gemma)
GEMMA2 = llama.make_family("Gemma2ForCausalLM", read_gemma2)
GEMMA3_TEXT = llama.make_family("Gemma3ForCausalLM", read_gemma3_text)
