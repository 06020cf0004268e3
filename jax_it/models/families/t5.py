"""T5 and its relatives, with the layout of their weights in Transformers' checkpoints.

One module covers T5 1.0 (ReLU, tied head), T5 1.1, LM-adapted T5, Flan-T5 and UL2 (gated, untied),
mT5, ByT5, and umT5 (a relative-position bias in every layer). Sources: Raffel et al. 2020 and the
PyTorch models of Transformers 5, whose logits the tests reproduce.
"""

from collections.abc import Mapping
from typing import Any

from jax_it.models import encoder_decoder
from jax_it.models.config import EncoderDecoderConfig, StackConfig
from jax_it.models.config_json import ConfigReader
from jax_it.models.family import Family
from jax_it.models.linear import ACTIVATIONS
from jax_it.models.relative_bias import RelativeBias
from jax_it.models.weights import WeightSpec


def read_config(values: Mapping[str, Any], where: str) -> EncoderDecoderConfig:
    """Read a T5-like `config.json`. Raises UserError for a value that is not implemented."""
    reader = ConfigReader(values, where)
    kind = reader.choose("model_type", ["t5", "mt5", "umt5"])
    projection = reader.get("feed_forward_proj", str, "relu" if kind == "t5" else "gated-gelu")
    activation = projection.removeprefix("gated-")
    if projection == "gated-gelu":
        activation = "gelu_new"  # Transformers' reading of this name
    if activation not in ACTIVATIONS:
        reader.refuse("feed_forward_proj", [*ACTIVATIONS, *(f"gated-{a}" for a in ACTIVATIONS)])
    encoder_layers = reader.size("num_layers", 6 if kind == "t5" else 8)
    tie = reader.get("tie_word_embeddings", bool, True)
    # Transformers 5 lets `tie_word_embeddings` decide T5's scaling, never scales mT5 and always umT5.
    scaled = reader.get("scale_decoder_outputs", bool, tie)
    reader.expect(is_encoder_decoder=True, is_decoder=False, chunk_size_feed_forward=0)
    reader.expect(is_gated_act=projection.startswith("gated-"), dense_act_fn=activation)  # written beside it
    buckets = reader.size("relative_attention_num_buckets", 32)
    if buckets < 4 or buckets % 2:
        raise reader.bad(
            "relative_attention_num_buckets",
            "it must be an even number, at least 4: in the encoder each side has half",
        )
    max_distance = reader.size("relative_attention_max_distance", 128)
    if max_distance <= buckets // 2:
        raise reader.bad(
            "relative_attention_max_distance",
            f"it must be above {buckets // 2}, half of relative_attention_num_buckets, which are of one distance each",
        )
    vocab_size = reader.size("vocab_size", 32128 if kind == "t5" else 250112)
    pad = reader.get_token("pad_token_id", vocab_size) or 0
    start = reader.get_token("decoder_start_token_id", vocab_size)
    embed_dim, rate = reader.size("d_model", 512), reader.rate("dropout_rate", 0.1)
    num_heads = reader.size("num_heads", 8 if kind == "t5" else 6)
    is_scaled = {"t5": scaled, "mt5": False, "umt5": True}[kind]

    def half(num_layers: int, *, is_encoder: bool) -> StackConfig:
        return StackConfig(
            vocab_size=vocab_size,
            embed_dim=embed_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=reader.size("d_kv", 64),
            mlp_dim=reader.size("d_ff", 2048 if kind == "t5" else 1024),
            activation=activation,
            norm_eps=reader.positive("layer_norm_epsilon", 1e-6),
            gated_mlp=projection.startswith("gated-"),
            relative_bias=RelativeBias(buckets, max_distance, is_encoder, per_layer=kind == "umt5"),
            encoder_dim=0 if is_encoder else embed_dim,
            attn_scale=1.0,
            output_scale=1.0 if is_encoder or not is_scaled else embed_dim**-0.5,
            embedding_init=1.0,
            dropout_in=("attention", "mlp"),
        )

    config = EncoderDecoderConfig(
        model_type=kind,
        encoder=half(encoder_layers, is_encoder=True),
        decoder=half(reader.size("num_decoder_layers", encoder_layers), is_encoder=False),
        tied=tie,
        shared_embedding=True,
        dropout=rate,
        decoder_start_token_id=pad if start is None else start,
        pad_token_id=pad,
        eos_token_ids=reader.get_tokens("eos_token_id", vocab_size) or (1,),
    )
    # The last is umT5's, and nothing reads it.
    # Neither has an effect on logits.
    reader.rate("classifier_dropout", 0.0)
    reader.get("initializer_factor", float, 1.0)
    reader.finish(ignored=("scalable_attention",))
    return config


def weight_table(c: EncoderDecoderConfig) -> dict[str, WeightSpec]:
    """Return our path -> its axes, and the name and layout of the same weight in Transformers."""
    table = {"embedding": WeightSpec("V D", "shared.weight", "V D")}
    if not c.tied:
        table["head"] = WeightSpec("V D", "lm_head.weight", "V D")
    for stack, config in (("encoder", c.encoder), ("decoder", c.decoder)):
        ours, block = f"{stack}.layers", f"{stack}.block.{{L}}.layer"
        table |= _attention_weights(f"{ours}.attention", f"{block}.0", "SelfAttention")
        if config.encoder_dim:
            table |= _attention_weights(f"{ours}.cross", f"{block}.1", "EncDecAttention")
        mlp = f"{block}.{2 if config.encoder_dim else 1}"
        table[f"{ours}.mlp_norm.scale"] = WeightSpec("L D", f"{mlp}.layer_norm.weight", "D")
        up = {"gate": "wi_0", "up": "wi_1"} if config.gated_mlp else {"up": "wi"}
        for path, name in up.items():
            table[f"{ours}.mlp.{path}"] = WeightSpec("L D F", f"{mlp}.DenseReluDense.{name}.weight", "F D")
        table[f"{ours}.mlp.down"] = WeightSpec("L F D", f"{mlp}.DenseReluDense.wo.weight", "D F")
        bias = "SelfAttention.relative_attention_bias.weight"
        if config.relative_bias and config.relative_bias.per_layer:
            table[f"{ours}.relative_bias"] = WeightSpec("L E N", f"{block}.0.{bias}", "E N")
        else:
            table[f"{stack}.relative_bias"] = WeightSpec("E N", f"{stack}.block.0.layer.0.{bias}", "E N")
        table[f"{stack}.norm.scale"] = WeightSpec("D", f"{stack}.final_layer_norm.weight", "D")
    return table


def _attention_weights(ours: str, theirs: str, name: str) -> dict[str, WeightSpec]:
    table = {f"{ours}_norm.scale": WeightSpec("L D", f"{theirs}.layer_norm.weight", "D")}
    for path, heads in (("query", "N"), ("key", "K"), ("value", "K")):
        table[f"{ours}.{path}"] = WeightSpec(f"L D {heads} H", f"{theirs}.{name}.{path[0]}.weight", f"({heads} H) D")
    table[f"{ours}.output"] = WeightSpec("L N H D", f"{theirs}.{name}.o.weight", "D (N H)")
    return table


def values_to_save(c: EncoderDecoderConfig) -> dict[str, Any]:
    """Return the values that say whether the head is tied and scaled, in old and new Transformers."""
    values: dict[str, Any] = {"decoder_start_token_id": c.decoder_start_token_id}
    if c.model_type == "t5":
        is_scaled = c.decoder.output_scale != 1
        values |= {"tie_word_embeddings": is_scaled, "scale_decoder_outputs": is_scaled}
    return values


def _family(architecture: str) -> Family:
    return Family(
        kind="seq2seq",
        architecture=architecture,
        read_config=read_config,
        weight_table=weight_table,
        module=encoder_decoder.EncoderDecoder,
        logits=encoder_decoder.logits,
        embedding="shared.weight",
        head="lm_head.weight",
        aliases={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
        ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        values_to_save=values_to_save,
    )


T5_FAMILY = _family("T5ForConditionalGeneration")
MT5_FAMILY = _family("MT5ForConditionalGeneration")
UMT5_FAMILY = _family("UMT5ForConditionalGeneration")
