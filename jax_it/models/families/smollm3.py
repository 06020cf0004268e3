"""SmolLM3: Llama, with layers that do not rotate."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind, shortest_period
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = llama.read_common(
        reader,
        tied=True,
        kv_heads=4,
        null_kv_heads=True,
        special_tokens=(128000, 128001, 128004),
    )
    number = common["num_layers"]
    interval = reader.size("no_rope_layer_interval", 4)
    rotates = reader.get_list("no_rope_layers", int)
    if rotates is None:
        rotates = [int((i + 1) % interval != 0) for i in range(number)]
    if len(rotates) != number:
        raise reader.bad("no_rope_layers", f"it must be a list of {number} numbers, 1 where a layer rotates")
    window = llama.read_window(reader)
    if not reader.get("use_sliding_window", bool, False):
        window = 0  # and layers of `layer_types` that slide are refused: it depends on the kernel if they do
    if window and not reader.has("layer_types"):
        windows: tuple[int, ...] = tuple(0 if r else window for r in rotates)
    else:
        windows = llama.read_windows(reader, number, window)
    rotation = rope.read(reader, common["head_dim"], theta=2e6)
    kinds = [LayerKind(window, rotation if r else None) for window, r in zip(windows, rotates, strict=True)]
    config = CausalLMConfig(
        **common,
        **llama.read_bias(reader),
        mlp_bias=reader.get("mlp_bias", bool, False),
        layer_kinds=shortest_period(kinds),
    )
    reader.get("max_window_layers", int, 0)  # layer_types decides
    reader.finish()
    return config


SMOLLM3 = llama.make_family("SmolLM3ForCausalLM", read_config)
