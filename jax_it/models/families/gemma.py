"""Gemma 1, 2 and 3 (text): norms scaled by 1 + w, scaled embeddings.

Gemma 2 has capped scores and logits, norms on both sides, and a window in every second layer; Gemma 3 has
norms of queries and keys, and five layers with a window and a rope of their own to one without.
"""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.families import llama
from jax_it.models.settings import Settings
from jax_it.models.transformer import Config


def _read_common(settings: Settings, act: str) -> dict[str, Any]:
    """What all three share, as arguments of `Config`."""
    common = llama.read_common(settings, tied=True, act=act)
    settings.expect(use_bidirectional_attention=False)
    bias = settings.get("attention_bias", bool, False)
    return common | {
        "head_size": settings.get("head_dim", int, 256),
        "norm": "rms_plus_one",
        "embedding_scale": common["width"] ** 0.5,
        "attention_bias": bias,
        "output_bias": bias,
    }


def read_gemma(values: Mapping[str, Any], where: str) -> Config:
    """`gelu` has always meant the tanh approximation here."""
    tanh = "gelu_pytorch_tanh"
    if values.get("hidden_act") in (None, "gelu"):
        values = {**values, "hidden_act": tanh}
    settings = Settings(values, where)
    common = _read_common(settings, "hidden_act")
    settings.expect(hidden_activation=tanh)
    config = Config(**common, ropes=(rope.read(settings, common["head_size"]),))
    settings.finish()
    return config


def _read_newer(settings: Settings, act: str = "hidden_activation") -> dict[str, Any]:
    """What Gemma 2 and 3 share beyond that."""
    common = _read_common(settings, act)
    settings.expect(cache_implementation="hybrid", hidden_act="gelu_pytorch_tanh")
    scalar = settings.get("query_pre_attn_scalar", float, 256.0)
    return common | {"placement": "both", "score_scale": scalar**-0.5}


def read_gemma2(values: Mapping[str, Any], where: str) -> Config:
    settings = Settings({"hidden_activation": "gelu_pytorch_tanh", **values}, where)
    common = _read_newer(settings)
    window = settings.get("sliding_window", int, 4096)
    config = Config(
        **common,
        score_cap=_cap(settings, values, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(settings, values, "final_logit_softcapping", 30.0),
        ropes=(rope.read(settings, common["head_size"]),),
        windows=llama.read_windows(settings, common["layers"], window, ("sliding_attention", "full_attention")),
    )
    settings.expect(sliding_window_size=window)
    settings.finish()
    return config


def _cap(settings: Settings, values: Mapping[str, Any], key: str, default: float) -> float:
    """A soft cap; null means none, an absent key the family's default."""
    return settings.get(key, float, 0.0 if key in values else default)


def read_gemma3_text(values: Mapping[str, Any], where: str) -> Config:
    settings = Settings({"hidden_activation": "gelu_pytorch_tanh", **values}, where)
    common = _read_newer(settings)
    settings.expect(attn_logit_softcapping=0.0)
    pattern = settings.get("sliding_window_pattern", int, settings.get("_sliding_window_pattern", int, 6))
    windows = llama.read_windows(
        settings, common["layers"], settings.get("sliding_window", int, 4096),
        ("sliding_attention",) * (pattern - 1) + ("full_attention",),
    )  # fmt: skip
    config = Config(
        **common,
        head_norm="each",
        logit_cap=settings.get("final_logit_softcapping", float, 0.0),
        ropes=_read_ropes(settings, common["head_size"]),
        layer_ropes=tuple(1 if window else 0 for window in windows),
        windows=windows,
    )
    settings.finish()
    return config


def _read_ropes(settings: Settings, head_size: int) -> tuple[rope.Rope, rope.Rope]:
    """The ropes of full and of sliding layers, in either form of config.json."""
    length = settings.get("max_position_embeddings", int, 0)
    scaling, nested = settings.get("rope_scaling", dict, {}), settings.get("rope_parameters", dict, {})
    keys = {"full": ("rope_theta", 1e6), "sliding": ("rope_local_base_freq", 1e4)}
    theta = {kind: settings.get(key, float, default) for kind, (key, default) in keys.items()}

    def make(kind: str, scaling: Mapping[str, Any]) -> rope.Rope:
        given = nested.get(f"{kind}_attention") or {}
        values = {"rope_theta": theta[kind], "partial_rotary_factor": 1.0, **given, **scaling}
        return rope.make(values, head_size, length, 0, settings.where)

    return make("full", scaling), make("sliding", {})


GEMMA = llama.make_family("GemmaForCausalLM", read_gemma)
GEMMA2 = llama.make_family("Gemma2ForCausalLM", read_gemma2)
GEMMA3_TEXT = llama.make_family("Gemma3ForCausalLM", read_gemma3_text)
