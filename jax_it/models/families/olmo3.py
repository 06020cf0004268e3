"""OLMo 3 (OLMo team 2025): OLMo 2 with three layers that have a window, and a rope of their own, to one without."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind, shortest_period
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama

THETA = 500000.0


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, epsilon=1e-5, special_tokens=(None, 50279, 1))
    pattern = ("sliding_attention",) * 3 + ("full_attention",)
    windows = llama.read_windows(reader, common["num_layers"], llama.read_window(reader, 4096), pattern)
    # Transformers reads `rope_theta` for full layers alone.
    full, sliding = rope.read_by_layer_type(
        reader, common["head_dim"], full_theta=reader.positive("rope_theta", THETA), sliding_theta=THETA
    )
    config = CausalLMConfig(
        **common,
        norm_placement="post_norm",
        qk_norm="all_heads",
        **llama.read_bias(reader),
        layer_kinds=shortest_period([LayerKind(window, sliding if window else full) for window in windows]),
    )
    reader.finish()
    return config


OLMO3 = llama.make_family("Olmo3ForCausalLM", read_config)
