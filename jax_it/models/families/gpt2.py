"""GPT-2 (Radford et al. 2019): learned positions, layer norms, matrices stored as [inputs, outputs]."""

from collections.abc import Mapping
from typing import Any

from jax_it.models.config import CausalLMConfig
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama
from jax_it.models.linear import ACTIVATIONS
from jax_it.models.weights import WeightSpec


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    width, heads = reader.size("n_embd"), reader.size("n_head")
    if width % heads:
        raise reader.bad("n_embd", f"n_head, {heads}, must divide it")
    vocab_size = reader.size("vocab_size")
    activation = reader.choose("activation_function", list(ACTIVATIONS), "gelu_new")
    rate = reader.rate("resid_pdrop", 0.1)
    for key in ("embd_pdrop", "attn_pdrop"):
        if reader.get(key, float, 0.1) != rate:
            reader.refuse(key, [f"{rate}, the rate of resid_pdrop"])
    reader.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    config = CausalLMConfig(
        model_type=reader.need("model_type", str),
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=reader.size("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=reader.size("n_inner", 4 * width),
        activation=activation,
        norm_eps=reader.positive("layer_norm_epsilon", 1e-5),
        tied=reader.get("tie_word_embeddings", bool, True),
        **llama.read_special_tokens(reader, vocab_size, (50256, 50256, None)),
        gated_mlp=False,
        norm="layer",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        positions=reader.size("n_positions", 1024),
        dropout=rate,
    )
    # Of a head for summaries, which a language model does not have.
    for name, default in {"type": "", "use_proj": True, "activation": "", "proj_to_labels": True}.items():
        reader.get(f"summary_{name}", type(default), default)
    reader.get("summary_first_dropout", float, 0.1)
    reader.finish(ignored=("n_ctx", "reorder_and_upcast_attn"))
    return config


def weight_table(c: CausalLMConfig) -> dict[str, WeightSpec]:
    layer = "transformer.h.{L}"
    table = {
        "embedding": WeightSpec("V D", "transformer.wte.weight", "V D"),
        "positions": WeightSpec("P D", "transformer.wpe.weight", "P D"),
        "layers.attention.output": WeightSpec("L N H D", f"{layer}.attn.c_proj.weight", "(N H) D"),
        "layers.attention.output_bias": WeightSpec("L D", f"{layer}.attn.c_proj.bias", "D"),
        "layers.mlp.up": WeightSpec("L D F", f"{layer}.mlp.c_fc.weight", "D F"),
        "layers.mlp.up_bias": WeightSpec("L F", f"{layer}.mlp.c_fc.bias", "F"),
        "layers.mlp.down": WeightSpec("L F D", f"{layer}.mlp.c_proj.weight", "F D"),
        "layers.mlp.down_bias": WeightSpec("L D", f"{layer}.mlp.c_proj.bias", "D"),
    }
    for i, path in enumerate(("query", "key", "value")):
        heads = "K" if i else "N"
        part = f"{i * c.embed_dim}+({heads} H)+{(2 - i) * c.embed_dim}"
        table[f"layers.attention.{path}"] = WeightSpec(f"L D {heads} H", f"{layer}.attn.c_attn.weight", f"D {part}")
        table[f"layers.attention.{path}_bias"] = WeightSpec(f"L {heads} H", f"{layer}.attn.c_attn.bias", part)
    for path, axes, name in (
        ("layers.attention_norm", "L D", f"{layer}.ln_1"),
        ("layers.mlp_norm", "L D", f"{layer}.ln_2"),
        ("norm", "D", "transformer.ln_f"),
    ):
        table[f"{path}.scale"] = WeightSpec(axes, f"{name}.weight", "D")
        table[f"{path}.bias"] = WeightSpec(axes, f"{name}.bias", "D")
    if not c.tied:
        table["head"] = WeightSpec("V D", "lm_head.weight", "V D")
    return table


GPT2 = llama.make_family(
    "GPT2LMHeadModel",
    read_config,
    weight_table,
    embedding="transformer.wte.weight",
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    prefix="transformer.",
)
