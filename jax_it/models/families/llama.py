"""Llama 2 and 3 (Touvron et al. 2023), SmolLM2, and all that Transformers calls Llama.

Most families have Llama's names for their settings and weights; they begin with `read_common` and `weight_table`.
"""

from collections.abc import Mapping
from typing import Any

from jax_it.errors import UserError
from jax_it.models import causal_lm, rope
from jax_it.models.config import CausalLMConfig, LayerKind, StackConfig
from jax_it.models.config_json import ConfigReader
from jax_it.models.family import Family
from jax_it.models.linear import ACTIVATIONS
from jax_it.models.weights import WeightSpec

SpecialTokens = tuple[int | None, int | None, int | None]  # the tokens that begin, end and fill texts


def read_common(
    reader: ConfigReader,
    *,
    tied: bool = False,
    act: tuple[str, str] = ("hidden_act", "silu"),
    kv_heads: int = 0,
    null_kv_heads: bool = False,
    head_dim: int = 0,
    epsilon: float = 1e-6,
    special_tokens: SpecialTokens = (None, None, None),
    whole_heads: bool = False,
) -> dict[str, Any]:
    """Return the values that families with Llama's settings share, as arguments of `CausalLMConfig`.

    It reads the keys model_type, vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads, head_dim, rms_norm_eps, tie_word_embeddings, the activation, and those of special tokens. Rope,
    windows, biases and whatever is the family's own are left to the caller.

    The keyword arguments are the family's defaults; 0 means that a value follows from others. `act` is the activation's
    key and its default. `null_kv_heads`: null in `num_key_value_heads` means as many as heads, not the default.
    `whole_heads`: Transformers refuses a width that the heads do not divide even if `head_dim` is
    given.
    """
    activation = reader.choose(act[0], list(ACTIVATIONS), act[1])
    reader.expect(attention_dropout=0.0, is_encoder_decoder=False, add_cross_attention=False)
    reader.expect(is_decoder=False, chunk_size_feed_forward=0)
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if null_kv_heads and reader.is_null("num_key_value_heads"):
        kv_heads = 0
    kv_heads = reader.size("num_key_value_heads", kv_heads or heads)
    if heads % kv_heads:
        raise reader.bad("num_key_value_heads", f"it must be there and divide num_attention_heads, {heads}")
    head_dim = head_dim or (reader.size("head_dim") if reader.has("head_dim") else 0)
    if (whole_heads or not head_dim) and width % heads:
        raise reader.bad("hidden_size", f"num_attention_heads, {heads}, must divide it")
    vocab_size = reader.size("vocab_size")
    norm_eps = reader.get("rms_norm_eps", float, epsilon)
    if norm_eps < 0:
        raise reader.bad("rms_norm_eps", "it must not be negative")
    return {
        "model_type": reader.need("model_type", str),
        "vocab_size": vocab_size,
        "embed_dim": width,
        "num_layers": reader.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": reader.size("head_dim", head_dim or width // heads),
        "mlp_dim": reader.size("intermediate_size"),
        "activation": activation,
        "norm_eps": norm_eps,
        "tied": reader.get("tie_word_embeddings", bool, tied),
        **read_special_tokens(reader, vocab_size, special_tokens),
    }


def read_special_tokens(
    reader: ConfigReader, vocab_size: int, defaults: SpecialTokens = (None, None, None)
) -> dict[str, Any]:
    """Read the tokens that begin, end and fill texts, as arguments of `CausalLMConfig`.

    Null means none; without a key it is the family's default, if the vocabulary has it. Padding must be in it.
    """

    def default(key: str, token: int | None) -> int | None:
        return None if reader.is_null(key) or token is None or token >= vocab_size else token

    start, end, pad = (
        default(f"{name}_token_id", token) for name, token in zip(("bos", "eos", "pad"), defaults, strict=True)
    )
    given = {name: reader.get_token(f"{name}_token_id", vocab_size) for name in ("bos", "pad")}
    if given["pad"] is None and pad != defaults[2] and not reader.is_null("pad_token_id"):
        raise UserError(
            f"{reader.where}: pad_token_id is missing, and the default, {defaults[2]}, is not in the vocabulary of "
            f"{vocab_size} tokens; add the token, or null"
        )
    ends = reader.get_tokens("eos_token_id", vocab_size)
    return {
        "eos_token_ids": ends or (() if end is None else (end,)),
        "pad_token_id": pad if given["pad"] is None else given["pad"],
        "bos_token_id": start if given["bos"] is None else given["bos"],
    }


def read_bias(reader: ConfigReader, default: bool = False) -> dict[str, Any]:
    """Read `attention_bias`, of all four linear layers of attention, as arguments of `CausalLMConfig`."""
    bias = reader.get("attention_bias", bool, default)
    return {"attention_bias": bias, "output_bias": bias}


def read_window(reader: ConfigReader, default: int = 0) -> int:
    """Read `sliding_window`: how many positions a token sees; 0 for all, which null means."""
    if reader.has("sliding_window"):
        return reader.size("sliding_window")
    return 0 if reader.is_null("sliding_window") else default


def read_windows(
    reader: ConfigReader, number: int, window: int, default_pattern: tuple[str, ...] = ()
) -> tuple[int, ...]:
    """Return each layer's window; 0: full attention.

    `layer_types` says which layers have one, or else the repeating `default_pattern`; without either none has.
    """
    kinds = reader.get_list("layer_types", str)
    if kinds is None:
        pattern = default_pattern or ("full_attention",)
        kinds = [pattern[i % len(pattern)] for i in range(number)]
    known = {"sliding_attention": window, "full_attention": 0}
    if len(kinds) != number or not set(kinds) <= set(known):
        raise reader.bad("layer_types", f"it must be a list of {number} of {', '.join(known)}")
    if "sliding_attention" in kinds and not window:
        raise reader.bad("sliding_window", "it must be there and used, for layer_types has layers with a window")
    return tuple(known[kind] for kind in kinds)


def read_config(values: Mapping[str, Any], where: str) -> CausalLMConfig:
    reader = ConfigReader(values, where)
    common = read_common(reader, special_tokens=(1, 2, None), whole_heads=True)
    config = CausalLMConfig(
        **common,
        **read_bias(reader),
        mlp_bias=reader.get("mlp_bias", bool, False),
        layer_kinds=(LayerKind(rope=rope.read(reader, common["head_dim"])),),
    )
    reader.expect(rope_interleaved=False)
    reader.finish(ignored=("is_llama_config", "transformers.js_config"))
    return config


# The norms' names in Transformers, by where they stand.
NORMS = {
    "pre_norm": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post_norm": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "sandwich_norm": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


def weight_table(c: CausalLMConfig, norms: Mapping[str, str] | None = None) -> dict[str, WeightSpec]:
    """Return the weight table under Llama's names; `norms` are other names of the norms."""
    table = {
        "embedding": WeightSpec("V D", "model.embed_tokens.weight", "V D"),
        "norm.scale": WeightSpec("D", "model.norm.weight", "D"),
    }
    if not c.tied:
        table["head"] = WeightSpec("V D", "lm_head.weight", "V D")
    layer = "model.layers.{L}"
    table |= attention_weights(c, "layers.attention", f"{layer}.self_attn")
    if not c.experts:
        table |= mlp_weights(c, "layers.mlp", f"{layer}.mlp")
    return table | norm_weights("layers", layer, norms or NORMS[c.norm_placement])


def attention_weights(c: StackConfig, ours: str, theirs: str) -> dict[str, WeightSpec]:
    """Return the weights of one kind of attention, at our path `ours` and the path `theirs` in Transformers.

    With `qk_norm` the norms of queries and keys are among them, named `q_norm` and `k_norm`.
    """
    table = {}
    for path, name, heads in (("query", "q_proj", "N"), ("key", "k_proj", "K"), ("value", "v_proj", "K")):
        table[f"{ours}.{path}"] = WeightSpec(f"L D {heads} H", f"{theirs}.{name}.weight", f"({heads} H) D")
        if c.attention_bias:
            table[f"{ours}.{path}_bias"] = WeightSpec(f"L {heads} H", f"{theirs}.{name}.bias", f"({heads} H)")
    table[f"{ours}.output"] = WeightSpec("L N H D", f"{theirs}.o_proj.weight", "D (N H)")
    if c.output_bias:
        table[f"{ours}.output_bias"] = WeightSpec("L D", f"{theirs}.o_proj.bias", "D")
    for path, heads in (("query", "N"), ("key", "K")):
        norm = f"{ours}.{path}_norm.scale"
        if c.qk_norm == "head":
            table[norm] = WeightSpec("L H", f"{theirs}.{path[0]}_norm.weight", "H")
        elif c.qk_norm == "all_heads":
            table[norm] = WeightSpec(f"L {heads} H", f"{theirs}.{path[0]}_norm.weight", f"({heads} H)")
    return table


def mlp_weights(c: StackConfig, ours: str, theirs: str) -> dict[str, WeightSpec]:
    """Return the weights of the feed-forward layers."""
    table = {}
    for path, axes, layout in (("gate", "D F", "F D"), ("up", "D F", "F D"), ("down", "F D", "D F")):
        table[f"{ours}.{path}"] = WeightSpec(f"L {axes}", f"{theirs}.{path}_proj.weight", layout)
        if c.mlp_bias:
            table[f"{ours}.{path}_bias"] = WeightSpec(f"L {axes[-1]}", f"{theirs}.{path}_proj.bias", axes[-1])
    return table


def norm_weights(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, WeightSpec]:
    """Return the scales of a layer's norms, whose names in Transformers are given."""
    return {f"{ours}.{path}.scale": WeightSpec("L D", f"{theirs}.{name}.weight", "D") for path, name in names.items()}


def make_family(architecture: str, read_config: Any, weight_table: Any = weight_table, **changes: Any) -> Family:
    """Return a causal family whose names are Llama's."""
    common: dict[str, Any] = {
        "embedding": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "ignored": r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        "values_to_save": lambda c: {"tie_word_embeddings": c.tied},
    }
    return Family(
        kind="causal",
        architecture=architecture,
        read_config=read_config,
        weight_table=weight_table,
        module=causal_lm.CausalLM,
        logits=causal_lm.logits,
        **(common | changes),
    )


LLAMA = make_family("LlamaForCausalLM", read_config)
