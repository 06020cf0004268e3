"""Qwen2 and 2.5 (biases of queries, keys and values), Qwen3 (norms of queries and keys), Qwen3-MoE."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind, shortest_period
from jax_it.models.config_json import ConfigReader
from jax_it.models.experts import Experts
from jax_it.models.families import llama
from jax_it.models.families.mixtral import read_experts
from jax_it.models.weights import WeightSpec


def _read_windows(reader: ConfigReader, number: int) -> tuple[int, ...]:
    """Read the windows of the layers from `max_window_layers` on, where `use_sliding_window` is set."""
    window, first = llama.read_window(reader, 4096), reader.get("max_window_layers", int, 28)
    if not reader.get("use_sliding_window", bool, False):
        window = 0
    default = tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(number))
    return llama.read_windows(reader, number, window, default)


def read_qwen2(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, kv_heads=32, null_kv_heads=True)
    windows = _read_windows(reader, common["num_layers"])
    rotation = rope.read(reader, common["head_dim"])
    kinds = shortest_period([LayerKind(window, rotation) for window in windows])
    config = CausalLMConfig(**common, attention_bias=True, layer_kinds=kinds)
    reader.expect(use_mrope=False)
    reader.finish()
    return config


def read_qwen3(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(reader, kv_heads=32, null_kv_heads=True, head_dim=128)
    config = _make_qwen3(reader, common, _read_windows(reader, common["num_layers"]))
    reader.finish()
    return config


def read_qwen3_moe(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    """Read a config.json whose layers are all mixtures: dense ones among them could not be stacked with the rest.

    `use_sliding_window` puts a window into every layer, and there is no `layer_types`.
    """
    reader = ConfigReader(values, where)
    number = "num_local_experts" if reader.has("num_local_experts") else "num_experts"
    inner, normalized = reader.size("moe_intermediate_size", 768), reader.get("norm_topk_prob", bool, False)
    experts = read_experts(reader, number, 128, 8, inner, normalized=normalized)
    reader.expect(decoder_sparse_step=1, mlp_only_layers=[])
    common = llama.read_common(reader, kv_heads=4)
    window = llama.read_window(reader, 4096)
    if not reader.get("use_sliding_window", bool, False):
        window = 0
    windows = (window,) * common["num_layers"]
    if reader.has("layer_types"):  # Transformers writes it; the layers do not read it
        kinds = llama.read_windows(reader, common["num_layers"], window)
        if set(kinds) != {window}:
            raise reader.bad("layer_types", "in this family use_sliding_window decides, for all layers at once")
    config = _make_qwen3(reader, common, windows, experts)
    reader.get("max_window_layers", int, 0)  # use_sliding_window decides for all layers at once
    reader.finish(ignored=("num_experts",))
    return config


def _make_qwen3(
    reader: ConfigReader, common: dict[str, Any], windows: tuple[int, ...], experts: Experts | None = None
) -> CausalLMConfig:
    rotation = rope.read(reader, common["head_dim"])
    return CausalLMConfig(
        **common,
        **llama.read_bias(reader),
        qk_norm="head",
        layer_kinds=shortest_period([LayerKind(window, rotation) for window in windows]),
        experts=experts,
    )


def moe_weight_table(c: CausalLMConfig) -> dict[str, WeightSpec]:
    mlp = "model.layers.{L}.mlp"
    table = llama.weight_table(c) | {"layers.experts.router": WeightSpec("L D X", f"{mlp}.gate.weight", "X D")}
    for path, axes, layout in (("gate", "D F", "F D"), ("up", "D F", "F D"), ("down", "F D", "D F")):
        name = f"{mlp}.experts.{{X}}.{path}_proj.weight"
        table[f"layers.experts.{path}"] = WeightSpec(f"L X {axes}", name, layout)
    return table


QWEN2 = llama.make_family("Qwen2ForCausalLM", read_qwen2)
QWEN3 = llama.make_family("Qwen3ForCausalLM", read_qwen3)
QWEN3_MOE = llama.make_family("Qwen3MoeForCausalLM", read_qwen3_moe, moe_weight_table)
