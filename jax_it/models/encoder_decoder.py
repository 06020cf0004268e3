"""An encoder-decoder: T5 and its relatives, and T5Gemma."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import causal_lm
from jax_it.models.attention import causal_mask, segment_mask
from jax_it.models.causal_lm import embed
from jax_it.models.config import ComputeOptions, EncoderDecoderConfig
from jax_it.models.dropout import dropout, split_key
from jax_it.models.kv_cache import KVCache, Source
from jax_it.models.linear import normal
from jax_it.models.stack import Stack


class EncoderDecoder(nnx.Module):
    """See `family.Module` for what its methods take and return."""

    def __init__(self, c: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        self.config = c
        if not c.shared_embedding:
            source = c.encoder
            self.source_embedding = normal(rngs, (source.vocab_size, source.embed_dim), source.embedding_init)
        target = c.decoder
        self.embedding = normal(rngs, (target.vocab_size, target.embed_dim), target.embedding_init)
        if not c.tied:
            self.head = normal(rngs, (target.vocab_size, target.embed_dim), target.embed_dim**-0.5)
        self.encoder = Stack(c.encoder, rngs=rngs)
        self.decoder = Stack(c.decoder, rngs=rngs)

    def hidden_states(
        self, batch: Any, options: ComputeOptions, key: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        encoder_key, decoder_key, last_key = split_key(key, 3)
        encoded_BSD = self.encode(
            batch.source_BGS, batch.source_segments_BGS, batch.source_positions_BGS, options, encoder_key
        )
        segments_BT = batch.segments_BT
        source_segments_BS = batch.source_segments_BGS.reshape(segments_BT.shape[0], -1)
        x_BTD = embed(self.config.decoder, self.embedding, batch.tokens_BT, options.dtype)
        x_BTD, _, _ = self.decoder(
            x_BTD, batch.positions_BT, segments_BT > 0, causal_mask(segments_BT), options, decoder_key,
            encoded_BSD=encoded_BSD, cross_mask=segment_mask(segments_BT, source_segments_BS),
        )  # fmt: skip
        return dropout(x_BTD, options.dropout, last_key), None

    def encode(
        self, source_BGS: jax.Array, segments_BGS: jax.Array, positions_BGS: jax.Array, options: ComputeOptions,
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """Return the encoder's states [B * G, S, D]. A token attends within its block and segment."""
        tokens_BS, segments_BS, positions_BS = (
            array.reshape(-1, array.shape[-1]) for array in (source_BGS, segments_BGS, positions_BGS)
        )
        stack_key, last_key = split_key(key, 2)
        embedding = self.embedding if self.config.shared_embedding else self.source_embedding
        x_BSD = embed(self.config.encoder, embedding, tokens_BS, options.dtype)
        mask = segment_mask(segments_BS, segments_BS)
        x_BSD, _, _ = self.encoder(x_BSD, positions_BS, segments_BS > 0, mask, options, stack_key)
        return dropout(x_BSD, options.dropout, last_key)

    def prefill(
        self, source_BS: jax.Array, segments_BS: jax.Array, max_new_tokens: int, options: ComputeOptions
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """Read sources, and make cross-attention's keys and values for all steps; the first takes the start token."""
        rows = source_BS.shape[0]
        positions_BS = jnp.broadcast_to(jnp.arange(source_BS.shape[1]), source_BS.shape)
        encoded_BSD = self.encode(source_BS[:, None], segments_BS[:, None], positions_BS[:, None], options)
        source = Source(self.decoder.encode_cross_kv(encoded_BSD), segments_BS)
        cache = self.decoder.init_cache(rows, max_new_tokens, options.dtype, source)
        token_B = jnp.full(rows, self.config.decoder_start_token_id, jnp.int32)
        return token_B, jnp.zeros_like(token_B), cache

    def decode_step(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache, options: ComputeOptions
    ) -> tuple[jax.Array, KVCache]:
        x_BTD = embed(self.config.decoder, self.embedding, tokens_B[:, None], options.dtype)
        states_BTD, cache = self.decoder.step(x_BTD, positions_B[:, None], cache, options)
        return states_BTD[:, 0], cache


def logits(c: EncoderDecoderConfig, head_VD: jax.Array, states: jax.Array) -> jax.Array:
    """Return the float32 logits [..., V] of decoder states [..., D]."""
    return causal_lm.logits(c.decoder, head_VD, states)
