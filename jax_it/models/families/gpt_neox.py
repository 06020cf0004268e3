"""GPT-NeoX and Pythia (Black et al. 2022): part of each head rotates; attention and feed-forward side by side."""

from collections.abc import Mapping
from typing import Any

from jax_it.models import rope
from jax_it.models.config import CausalLMConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import llama
from jax_it.models.linear import ACTIVATIONS
from jax_it.models.weights import WeightSpec


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if width % heads:
        raise reader.bad("hidden_size", f"num_attention_heads, {heads}, must divide it")
    vocab_size = reader.size("vocab_size")
    activation = reader.choose("hidden_act", list(ACTIVATIONS), "gelu")
    reader.expect(attention_dropout=0.0, hidden_dropout=0.0)
    rotation = rope.read(
        reader, width // heads, share=0.25, theta_key="rotary_emb_base", share_key="rotary_pct"
    )  # fmt: skip
    config = CausalLMConfig(
        model_type=reader.need("model_type", str),
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=reader.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=reader.size("intermediate_size"),
        activation=activation,
        norm_eps=reader.positive("layer_norm_eps", 1e-5),
        tied=reader.get("tie_word_embeddings", bool, False),
        **llama.read_special_tokens(reader, vocab_size, (0, 2, None)),
        gated_mlp=False,
        norm="layer",
        norm_placement="parallel" if reader.get("use_parallel_residual", bool, True) else "pre_norm",
        **llama.read_bias(reader, True),
        mlp_bias=True,
        layer_kinds=(LayerKind(rope=rotation),),
    )
    # Neither has an effect on logits.
    reader.rate("classifier_dropout", 0.0)
    reader.get("is_decoder", bool, False)
    reader.finish(ignored=("rope_theta", "partial_rotary_factor"))
    return config


def weight_table(c: CausalLMConfig) -> dict[str, WeightSpec]:
    layer = "gpt_neox.layers.{L}"
    table = {
        "embedding": WeightSpec("V D", "gpt_neox.embed_in.weight", "V D"),
        "layers.attention.output": WeightSpec("L N H D", f"{layer}.attention.dense.weight", "D (N H)"),
        "layers.mlp.up": WeightSpec("L D F", f"{layer}.mlp.dense_h_to_4h.weight", "F D"),
        "layers.mlp.up_bias": WeightSpec("L F", f"{layer}.mlp.dense_h_to_4h.bias", "F"),
        "layers.mlp.down": WeightSpec("L F D", f"{layer}.mlp.dense_4h_to_h.weight", "D F"),
        "layers.mlp.down_bias": WeightSpec("L D", f"{layer}.mlp.dense_4h_to_h.bias", "D"),
    }
    for i, path in enumerate(("query", "key", "value")):
        heads, qkv = "K" if i else "N", f"{layer}.attention.query_key_value"
        table[f"layers.attention.{path}"] = WeightSpec(f"L D {heads} H", f"{qkv}.weight", f"({heads} {i}/3 H) D")
        if c.attention_bias:
            table[f"layers.attention.{path}_bias"] = WeightSpec(f"L {heads} H", f"{qkv}.bias", f"({heads} {i}/3 H)")
    if c.output_bias:
        table["layers.attention.output_bias"] = WeightSpec("L D", f"{layer}.attention.dense.bias", "D")
    for path, axes, name in (
        ("layers.attention_norm", "L D", f"{layer}.input_layernorm"),
        ("layers.mlp_norm", "L D", f"{layer}.post_attention_layernorm"),
        ("norm", "D", "gpt_neox.final_layer_norm"),
    ):
        table[f"{path}.scale"] = WeightSpec(axes, f"{name}.weight", "D")
        table[f"{path}.bias"] = WeightSpec(axes, f"{name}.bias", "D")
    if not c.tied:
        table["head"] = WeightSpec("V D", "embed_out.weight", "V D")
    return table


GPT_NEOX = llama.make_family(
    "GPTNeoXForCausalLM",
    read_config,
    weight_table,
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
