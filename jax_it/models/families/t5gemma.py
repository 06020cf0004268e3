"""T5Gemma (Zhang et al. 2025): an encoder-decoder whose two halves are Gemma 2's layers.

The encoder's see both ways, the decoder's have cross-attention after self-attention; the halves may differ in
width and depth, and each has an embedding of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_it.errors import UserError
from jax_it.models import encoder_decoder
from jax_it.models.config import CausalLMConfig, EncoderDecoderConfig, LayerKind
from jax_it.models.config_json import ConfigReader
from jax_it.models.families import gemma, llama
from jax_it.models.family import Family
from jax_it.models.weights import WeightSpec

# Of `T5GemmaModuleConfig`, where Gemma 2's config.json has others or none.
_DEFAULTS = {
    "model_type": "t5_gemma_module",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# Of a half, which Transformers overwrites with what the whole says.
_OVERWRITTEN = {"is_decoder", "dropout_rate", "attention_dropout", "classifier_dropout_rate"}


def read_config(values: Mapping[str, Any], where: str) -> EncoderDecoderConfig:
    reader = ConfigReader(values, where)
    encoder, target = (_read_half(reader, name) for name in ("encoder", "decoder"))
    # In Transformers the encoder's window is of tokens to either side, beside the token itself.
    kinds = tuple(LayerKind(kind.window and kind.window + 1, kind.rope) for kind in encoder.layer_kinds)
    if target.bos_token_id is None or target.pad_token_id is None:
        raise UserError(f"{where}: decoder: bos_token_id and pad_token_id must be tokens of its vocabulary")
    pad = reader.get_token("pad_token_id", target.vocab_size)
    config = EncoderDecoderConfig(
        model_type=reader.choose("model_type", ["t5gemma"]),
        encoder=dataclasses.replace(encoder, layer_kinds=kinds),
        decoder=dataclasses.replace(target, encoder_dim=encoder.embed_dim),
        tied=reader.get("tie_word_embeddings", bool, True),
        shared_embedding=False,
        dropout=reader.rate("dropout_rate", 0.0),
        decoder_start_token_id=target.bos_token_id,
        pad_token_id=target.pad_token_id if pad is None else pad,
        eos_token_ids=reader.get_tokens("eos_token_id", target.vocab_size) or target.eos_token_ids,
    )
    reader.expect(is_encoder_decoder=True, is_decoder=False, attention_dropout=0.0, chunk_size_feed_forward=0)
    reader.expect(decoder_start_token_id=config.decoder_start_token_id)
    reader.size("vocab_size", 1)  # the halves have their own
    reader.rate("classifier_dropout_rate", 0.0)  # of a head for classification: no effect on logits
    reader.finish()
    return config


def _read_half(reader: ConfigReader, name: str) -> CausalLMConfig:
    values, where = reader.need(name, dict), f"{reader.where}: {name}"
    given = _DEFAULTS | {
        key: value
        for key, value in values.items()
        if key not in _OVERWRITTEN and (value is not None or key not in _DEFAULTS)
    }
    if given["model_type"] != _DEFAULTS["model_type"]:
        raise UserError(f"{where}: model_type {given['model_type']!r} is not {_DEFAULTS['model_type']}")
    return dataclasses.replace(gemma.read_gemma2(given, where), dropout_in=("mlp",), tied=True)


_NORMS = {
    "attention_norm": "pre_self_attn_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_CROSS_NORMS = {"cross_norm": "pre_cross_attn_layernorm", "cross_post_norm": "post_cross_attn_layernorm"}


def weight_table(c: EncoderDecoderConfig) -> dict[str, WeightSpec]:
    """Return our path -> its axes, and the name and layout of the same weight in Transformers."""
    table = {
        "source_embedding": WeightSpec("V D", "model.encoder.embed_tokens.weight", "V D"),
        "embedding": WeightSpec("V D", "model.decoder.embed_tokens.weight", "V D"),
    }
    if not c.tied:
        table["head"] = WeightSpec("V D", "lm_head.out_proj.weight", "V D")
    for half, config in (("encoder", c.encoder), ("decoder", c.decoder)):
        ours, theirs = f"{half}.layers", f"model.{half}.layers.{{L}}"
        table[f"{half}.norm.scale"] = WeightSpec("D", f"model.{half}.norm.weight", "D")
        table |= llama.attention_weights(config, f"{ours}.attention", f"{theirs}.self_attn")
        table |= llama.mlp_weights(config, f"{ours}.mlp", f"{theirs}.mlp")
        table |= llama.norm_weights(ours, theirs, _NORMS)
        if config.encoder_dim:
            table |= llama.attention_weights(config, f"{ours}.cross", f"{theirs}.cross_attn")
            table |= llama.norm_weights(ours, theirs, _CROSS_NORMS)
    return table


T5GEMMA = Family(
    kind="seq2seq",
    architecture="T5GemmaForConditionalGeneration",
    read_config=read_config,
    weight_table=weight_table,
    module=encoder_decoder.EncoderDecoder,
    logits=encoder_decoder.logits,
    embedding="model.decoder.embed_tokens.weight",
    head="lm_head.out_proj.weight",
    values_to_save=lambda c: {"tie_word_embeddings": c.tied},
)
