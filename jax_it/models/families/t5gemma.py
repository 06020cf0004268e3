"""T5Gemma (Zhang et al. 2025): an encoder-decoder whose two halves are Gemma 2's layers.

The encoder's see both ways, the decoder's have cross-attention after self-attention; the halves may differ in
width and depth, and each has an embedding of its own.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.errors import UserError
from jax_it.models import decoder, layers, transformer
from jax_it.models.cache import Cache, Step, nothing, remember
from jax_it.models.decoder import Source, Stack, causal_mask, embed
from jax_it.models.families import gemma, llama
from jax_it.models.family import Family, Run
from jax_it.models.layers import split_key
from jax_it.models.linear import dropout
from jax_it.models.settings import Settings
from jax_it.models.weights import Weight


@dataclass(frozen=True)
class Config:
    """What of a `config.json` the computation depends on."""

    model_type: str
    encoder: transformer.Config
    decoder: transformer.Config
    tied: bool  # the head is the decoder's embedding
    dropout: float
    start_token: int
    pad_token: int
    end_tokens: tuple[int, ...]
    experts: None = None
    positions: int = 0  # learned ones

    @property
    def vocabulary(self) -> int:
        """The number of ids that both halves know."""
        return min(self.encoder.vocabulary, self.decoder.vocabulary)

    def flops(self, source_length: int, target_length: int, source_blocks: int = 1) -> float:
        """Matmul FLOPs of one row's forward pass: `source_blocks` blocks of `source_length`, one target row."""
        encoder = source_blocks * self.encoder.stack_flops(source_length)
        head = 2 * target_length * self.decoder.width * self.decoder.vocabulary
        return encoder + self.decoder.stack_flops(target_length, source_blocks * source_length) + head

    def scores(self, source_length: int, target_length: int, source_blocks: int = 1) -> float:
        """How many attention scores a row's forward pass makes, over all heads and layers."""
        encoder = source_blocks * self.encoder.scores(0, source_length)
        return encoder + self.decoder.scores(source_length, target_length, source_blocks)


# Of `T5GemmaModuleConfig`, where Gemma 2's reader has others or none.
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


def read_config(values: Mapping[str, Any], where: str) -> Config:
    settings = Settings(values, where)
    encoder, target = (_read_half(settings, name) for name in ("encoder", "decoder"))
    windows = tuple(window and window + 1 for window in encoder.windows)  # w tokens to either side, and itself
    if target.start_token is None or target.pad_token is None:
        raise UserError(f"{where}: decoder: bos_token_id and pad_token_id must be tokens of its vocabulary")
    pad = settings.get_token("pad_token_id", target.vocabulary)
    config = Config(
        model_type=settings.choose("model_type", ["t5gemma"]),
        encoder=dataclasses.replace(encoder, bidirectional=True, windows=windows),
        decoder=dataclasses.replace(target, memory_width=encoder.width),
        tied=settings.get("tie_word_embeddings", bool, True),
        dropout=settings.rate("dropout_rate", 0.0),
        start_token=target.start_token,
        pad_token=target.pad_token if pad is None else pad,
        end_tokens=settings.get_tokens("eos_token_id", target.vocabulary) or target.end_tokens,
    )
    settings.expect(is_encoder_decoder=True, is_decoder=False, attention_dropout=0.0, chunk_size_feed_forward=0)
    settings.expect(decoder_start_token_id=config.start_token)
    settings.size("vocab_size", 1)  # the halves have their own
    settings.finish(ignored=("classifier_dropout_rate",))
    return config


def _read_half(settings: Settings, name: str) -> transformer.Config:
    values, where = settings.need(name, dict), f"{settings.where}: {name}"
    given = _DEFAULTS | {
        key: value
        for key, value in values.items()
        if key not in _OVERWRITTEN and (value is not None or key not in _DEFAULTS)
    }
    if given["model_type"] != _DEFAULTS["model_type"]:
        raise UserError(f"{where}: model_type {given['model_type']!r} is not {_DEFAULTS['model_type']}")
    return dataclasses.replace(gemma.read_gemma2(given, where), inner_dropout="mlp", tied=True)


# Llama's names, with which the table starts -> T5Gemma's
_NAMES = {
    "input_layernorm": "pre_self_attn_layernorm",
    "post_attention_layernorm": "post_self_attn_layernorm",
}


def weight_table(c: Config) -> dict[str, Weight]:
    """Our path -> its axes, and the name and layout of the same weight in Transformers."""
    table = {}
    if not c.tied:
        table["head"] = Weight("V D", "lm_head.out_proj.weight", "V D")
    for half, config in (("encoder", c.encoder), ("decoder", c.decoder)):
        for path, weight in llama.weight_table(config).items():
            name = weight.name.replace("model.", f"model.{half}.", 1)
            for old, new in _NAMES.items():
                name = name.replace(old, new)
            ours = {"encoder.embedding": "source_embedding", "decoder.embedding": "embedding"}
            table[ours.get(f"{half}.{path}", f"{half}.{path}")] = weight._replace(name=name)
    for path, weight in list(table.items()):
        if path.startswith("decoder.layers.attention"):  # its norms, and the linear layers in it
            name = weight.name.replace("self_attn", "cross_attn")
            table[path.replace("attention", "cross", 1)] = weight._replace(name=name)
    return table


class T5Gemma(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c

        def draw(half: transformer.Config) -> nnx.Param:
            return layers.normal(rngs, (half.vocabulary, half.width), half.width**-0.5)

        self.source_embedding, self.embedding = draw(c.encoder), draw(c.decoder)
        if not c.tied:
            self.head = draw(c.decoder)
        self.encoder = Stack(c.encoder, rngs=rngs)
        self.decoder = Stack(c.decoder, rngs=rngs)

    def __call__(self, batch: Any, run: Run, key: jax.Array | None = None) -> jax.Array:
        """Decoder states before the head, [B, T, D], of a Seq2SeqBatch; dropout where a key is given."""
        encoder_key, decoder_key, last = split_key(key, 3)
        encoded_BSD = self.encode(
            batch.source_BGS, batch.source_segments_BGS, batch.source_positions_BGS, run, encoder_key
        )
        segments_BT = batch.segments_BT
        source_segments_BS = batch.source_segments_BGS.reshape(segments_BT.shape[0], -1)
        source = Source(encoded_BSD, segments_BT[:, :, None] == source_segments_BS[:, None])
        x_BTD = embed(self.config.decoder, self.embedding, batch.tokens_BT, run.dtype)
        x_BTD, _, _ = self.decoder.scan(
            x_BTD, batch.positions_BT, segments_BT, causal_mask(segments_BT), run, decoder_key, source=source
        )
        return dropout(x_BTD, run.dropout, last)

    def encode(
        self,
        source_BGS: jax.Array,
        segments_BGS: jax.Array,
        positions_BGS: jax.Array,
        run: Run,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The encoder's states, [B * G, S, D]. A token attends within its block and segment."""
        tokens_BS, segments_BS, positions_BS = (
            array.reshape(-1, array.shape[-1]) for array in (source_BGS, segments_BGS, positions_BGS)
        )
        first, last = split_key(key, 2)
        x_BSD = embed(self.config.encoder, self.source_embedding, tokens_BS, run.dtype)
        allowed_BTS = segments_BS[:, :, None] == segments_BS[:, None]
        x_BSD, _, _ = self.encoder.scan(x_BSD, positions_BS, segments_BS, allowed_BTS, run, first)
        return dropout(x_BSD, run.dropout, last)

    def prefill(
        self, source_BS: jax.Array, segments_BS: jax.Array, length: int, run: Run
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """(start tokens [B], their positions [B], cache) for at most `length` target tokens of each source."""
        c, rows = self.config.decoder, source_BS.shape[0]
        positions_BS = jnp.broadcast_to(jnp.arange(source_BS.shape[1]), source_BS.shape)
        encoded_BSD = self.encode(source_BS[:, None], segments_BS[:, None], positions_BS[:, None], run)
        empty = nothing(c.layers, rows, c.key_heads, c.head_size, length, run.dtype)
        first_B = jnp.full(rows, self.config.start_token, jnp.int32)
        return first_B, jnp.zeros_like(first_B), Cache(*empty, remember(self.decoder.layers, encoded_BSD, segments_BS))

    def stepper(self, run: Run) -> Step:
        """The decoder's states [B, D] after one more token a row, at its own position, and the new cache."""
        step = self.decoder.stepper(run)
        return lambda tokens_B, positions_B, cache: step(
            embed(self.config.decoder, self.embedding, tokens_B[:, None], run.dtype), positions_B, cache
        )


def head_logits(c: Config, head_VD: jax.Array, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of decoder states [..., D]."""
    return decoder.head_logits(c.decoder, head_VD, hidden)


T5GEMMA = Family(
    kind="seq2seq",
    architecture="T5GemmaForConditionalGeneration",
    read_config=read_config,
    weight_table=weight_table,
    module=T5Gemma,
    head_logits=head_logits,
    embedding="model.decoder.embed_tokens.weight",
    head="lm_head.out_proj.weight",
    values_to_save=lambda c: {"tie_word_embeddings": c.tied},
)
