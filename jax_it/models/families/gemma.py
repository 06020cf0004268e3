"""Gemma 1, 2 and 3 (text): norms scaled by 1 + w, scaled embeddings.

Gemma 2 has capped scores and logits, norms on both sides, and a window in every second layer; Gemma 3 has
norms of queries and keys, and five layers with a window and a rope of their own to one without.
"""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind, shortest_period
from jax_it.models.families import llama
from jax_it.models.settings import Settings

TANH = "gelu_pytorch_tanh"


def _read_common(settings: Settings, act: str, kv_heads: int, whole_heads: bool) -> dict[str, Any]:
    """Read what all three share, as arguments of `CausalLMConfig`."""
    common = llama.read_common(
        settings,
        tied=True,
        act=(act, TANH),
        kv_heads=kv_heads,
        head_dim=256,
        marks=(2, 1, 0),
        whole_heads=whole_heads,
    )
    settings.expect(use_bidirectional_attention=False)
    return common | {
        "norm": "rms_plus_one",
        "embedding_scale": common["embed_dim"] ** 0.5,
        "embedding_init": common["embed_dim"] ** -0.5,
        **llama.read_bias(settings),
    }


def read_gemma(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    """Read Gemma 1's config.json, in which `gelu` has always meant the tanh approximation."""
    if values.get("hidden_act") == "gelu":
        values = {**values, "hidden_act": TANH}
    settings = Settings(values, where)
    common = _read_common(settings, "hidden_act", kv_heads=16, whole_heads=False)
    settings.expect(hidden_activation=TANH)
    config = CausalLMConfig(**common, layer_kinds=(LayerKind(rope=rope.read(settings, common["head_dim"])),))
    settings.finish()
    return config


def _read_newer(settings: Settings, act: str = "hidden_activation") -> dict[str, Any]:
    """Read what Gemma 2 and 3 share beyond that."""
    common = _read_common(settings, act, kv_heads=4, whole_heads=True)
    settings.expect(cache_implementation="hybrid", hidden_act=TANH)
    scalar = settings.size("query_pre_attn_scalar", 256)
    return common | {"norm_placement": "sandwich_norm", "attn_scale": scalar**-0.5}


def read_gemma2(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    settings = Settings(values, where)
    common = _read_newer(settings)
    window, rotation = _read_window(settings), rope.read(settings, common["head_dim"])
    windows = llama.read_windows(settings, common["num_layers"], window, ("sliding_attention", "full_attention"))
    config = CausalLMConfig(
        **common,
        attn_logit_softcap=_cap(settings, "attn_logit_softcapping", 50.0),
        final_logit_softcap=_cap(settings, "final_logit_softcapping", 30.0),
        layer_kinds=shortest_period([LayerKind(window, rotation) for window in windows]),
    )
    settings.expect(sliding_window_size=window)
    settings.finish()
    return config


def _read_window(settings: Settings) -> int:
    """Read `sliding_window`, without which Transformers computes no layer, whatever its kind."""
    if settings.is_null("sliding_window"):
        raise settings.bad("sliding_window", "it must be there")
    return llama.read_window(settings, 4096)


def _cap(settings: Settings, key: str, default: float | None) -> float:
    """Read a soft cap; null means none, which is 0 to `CausalLMConfig`, and an absent key the family's default."""
    if not settings.has(key) and (default is None or settings.is_null(key)):
        return 0.0
    return settings.positive(key, default or 1.0)


def read_gemma3_text(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    settings = Settings(values, where)
    common = _read_newer(settings)
    settings.expect(attn_logit_softcapping=0.0)  # which Transformers reads and does not apply
    pattern = settings.size("sliding_window_pattern", 6)
    windows = llama.read_windows(
        settings, common["num_layers"], _read_window(settings),
        ("sliding_attention",) * (pattern - 1) + ("full_attention",),
    )  # fmt: skip
    full, sliding = rope.read_by_layer_type(
        settings, common["head_dim"],
        full_theta=settings.positive("rope_theta", 1e6), sliding_theta=settings.positive("rope_local_base_freq", 1e4),
    )  # fmt: skip
    config = CausalLMConfig(
        **common,
        qk_norm="head",
        final_logit_softcap=_cap(settings, "final_logit_softcapping", None),
        layer_kinds=shortest_period([LayerKind(window, sliding if window else full) for window in windows]),
    )
    settings.finish()
    return config


GEMMA = llama.make_family("GemmaForCausalLM", read_gemma)
GEMMA2 = llama.make_family("Gemma2ForCausalLM", read_gemma2)
GEMMA3_TEXT = llama.make_family("Gemma3ForCausalLM", read_gemma3_text)
