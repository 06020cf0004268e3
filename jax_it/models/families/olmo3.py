"""OLMo 3 (OLMo team 2025): OLMo 2 with three layers that have a window, and a rope of their own, to one without."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind, shortest_period
from jax_it.models.families import llama
from jax_it.models.settings import Settings

THETA = 500000.0


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    settings = Settings(values, where)
    common = llama.read_common(settings, epsilon=1e-5, marks=(None, 50279, 1))
    pattern = ("sliding_attention",) * 3 + ("full_attention",)
    windows = llama.read_windows(settings, common["num_layers"], llama.read_window(settings, 4096), pattern)
    # Transformers reads `rope_theta` for full layers alone.
    full, sliding = rope.read_by_layer_type(
        settings, common["head_dim"], full_theta=settings.positive("rope_theta", THETA), sliding_theta=THETA
    )
    config = CausalLMConfig(
        **common,
        norm_placement="post_norm",
        qk_norm="all_heads",
        **llama.read_bias(settings),
        layer_kinds=shortest_period([LayerKind(window, sliding if window else full) for window in windows]),
    )
    settings.finish()
    return config


OLMO3 = llama.make_family("Olmo3ForCausalLM", read_config)
