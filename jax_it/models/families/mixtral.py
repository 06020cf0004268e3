"""Mixtral (Jiang et al. 2024): Mistral, with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.experts import Experts
from jax_it.models.families import llama
from jax_it.models.settings import Settings
from jax_it.models.transformer import Config
from jax_it.models.weights import Weight


def read_config(values: Mapping[str, Any], where: str) -> Config:
    settings = Settings(values, where)
    common = llama.read_common(settings)
    window = settings.get("sliding_window", int, 0)
    settings.expect(router_jitter_noise=0.0)
    config = Config(
        **common | {"epsilon": settings.get("rms_norm_eps", float, 1e-5)},
        ropes=(rope.read(settings, common["head_size"], theta=1e6),),
        windows=(window,) * common["layers"] if window else (),
        experts=Experts(
            number=settings.get("num_local_experts", int, 8),
            per_token=settings.get("num_experts_per_tok", int, 2),
            feed_forward=common["feed_forward"],
            normalised=True,
        ),
    )
    settings.finish()
    return config


def weight_table(c: Config) -> dict[str, Weight]:
    moe = "model.layers.{L}.block_sparse_moe"
    return llama.weight_table(c) | {
        "layers.experts.router": Weight("L D X", f"{moe}.gate.weight", "X D"),
        "layers.experts.gate": Weight("L X D F", f"{moe}.experts.{{X}}.w1.weight", "F D"),
        "layers.experts.up": Weight("L X D F", f"{moe}.experts.{{X}}.w3.weight", "F D"),
        "layers.experts.down": Weight("L X F D", f"{moe}.experts.{{X}}.w2.weight", "D F"),
    }


MIXTRAL = llama.make_family("MixtralForCausalLM", read_config, weight_table)
