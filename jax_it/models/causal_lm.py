"""A causal language model: an embedding, a stack of layers and a head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import kv_cache
from jax_it.models.attention import causal_mask
from jax_it.models.config import CausalLMConfig, ComputeOptions, StackConfig
from jax_it.models.experts import Routing
from jax_it.models.kv_cache import KVCache, LongTexts
from jax_it.models.linear import look_up, normal, scale_by
from jax_it.models.stack import Stack
from jax_it.sharding import constrain


class CausalLM(Stack):
    """See `family.Module` for what its methods take and return."""

    config: CausalLMConfig

    def __init__(self, c: CausalLMConfig, *, rngs: nnx.Rngs):
        self.embedding = normal(rngs, (c.vocab_size, c.embed_dim), c.embedding_init)
        if c.positions:
            self.positions = normal(rngs, (c.positions, c.embed_dim), 0.02)
        if not c.tied:
            self.head = normal(rngs, (c.vocab_size, c.embed_dim), c.embed_dim**-0.5)
        super().__init__(c, rngs=rngs)

    @property
    def decoder(self) -> Stack:
        """The model itself: it is its own stack, so that its weights' paths begin with `layers`."""
        return self

    def hidden_states(
        self, batch: Any, options: ComputeOptions, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        mask, real_BT = causal_mask(batch.segments_BT, batch.prefix_BT), batch.segments_BT > 0
        x_BTD = self._embed(batch.tokens_BT, batch.positions_BT, options)
        lengths_BT = None
        if self.config.longrope_length:
            lengths_BT = (batch.segments_BT[:, :, None] == batch.segments_BT[:, None]).sum(-1)
        x_BTD, _, routing = self(x_BTD, batch.positions_BT, real_BT, mask, options, key, lengths_BT=lengths_BT)
        return x_BTD, routing

    def prefill(
        self, tokens_BS: jax.Array, segments_BS: jax.Array, max_new_tokens: int, options: ComputeOptions
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """Read prompts. The first step takes a prompt's last token, whose state it computes again."""
        position_B = jnp.maximum((segments_BS > 0).sum(1) - 1, 0)
        cache = self._read(tokens_BS, segments_BS, position_B, options)
        token_B = jnp.take_along_axis(tokens_BS, position_B[:, None], axis=1)[:, 0]
        return token_B, position_B, kv_cache.grow(cache, max_new_tokens)

    def decode_step(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache, options: ComputeOptions
    ) -> tuple[jax.Array, KVCache]:
        if cache.long_texts:
            cache = self._recompute_grown(tokens_B, positions_B, cache, options)
        x_BTD = self._embed(tokens_B[:, None], positions_B[:, None], options)
        states_BTD, cache = self.step(x_BTD, positions_B[:, None], cache, options)
        return states_BTD[:, 0], cache

    def extend(
        self, tokens_BT: jax.Array, segments_BT: jax.Array, start_B: jax.Array, cache: KVCache, options: ComputeOptions
    ) -> tuple[jax.Array, KVCache]:
        """Compute the next tokens of each row, from position `start_B` on. Return their states [B, T, D] and the cache.

        Segment 0 is padding behind them.
        """
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
        real_BT = segments_BT > 0
        x_BTD = self._embed(tokens_BT, jnp.where(real_BT, positions_BT, 0), options)
        return self.step(x_BTD, positions_BT, cache, options, real_BT)

    def _read(
        self, tokens_BS: jax.Array, segments_BS: jax.Array, position_B: jax.Array, options: ComputeOptions
    ) -> KVCache:
        """Compute all positions of texts whose last one is `position_B`, and return the cache that holds them."""
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        mask = causal_mask(segments_BS, segments_BS if options.prefix_lm else None)
        _, groups, _ = self(
            self._embed(tokens_BS, positions_BS, options), positions_BS, segments_BS > 0, mask, options,
            lengths_BT=position_B[:, None] + 1, cache_to_B=position_B,
        )  # fmt: skip
        long_texts = None
        if self.config.recompute_longrope and self.config.longrope_length:
            long_texts = LongTexts(tokens_BS, position_B >= self.config.longrope_length)
        return KVCache(tuple(groups), tokens_BS.shape[1], self.windows(), long_texts=long_texts)

    def _recompute_grown(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache, options: ComputeOptions
    ) -> KVCache:
        """Compute again the texts that outgrow LongRoPE's original length with this token.

        As Transformers does: all of a text rotates by the same frequencies.
        """
        assert cache.long_texts is not None
        tokens_BT = cache.long_texts.tokens.at[jnp.arange(tokens_B.size), positions_B].set(tokens_B)
        is_long_B = cache.long_texts.is_long
        cache = dataclasses.replace(cache, long_texts=LongTexts(tokens_BT, is_long_B))
        grown_B = (positions_B >= self.config.longrope_length) & ~is_long_B[: tokens_B.size]

        def recompute(cache: KVCache) -> KVCache:
            segments_BT = (jnp.arange(cache.capacity) <= positions_B[:, None]).astype(jnp.int32)
            new = self._read(tokens_BT[: tokens_B.size], segments_BT, positions_B, options)
            row_B = jnp.arange(tokens_B.size)
            return kv_cache.insert(cache, new, jnp.where(grown_B, row_B, cache.rows), row_B)

        return jax.lax.cond(grown_B.any(), recompute, lambda cache: cache, cache)

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, options: ComputeOptions) -> jax.Array:
        x_BTD = embed(self.config, self.embedding, tokens_BT, options.dtype)
        if self.config.positions:
            x_BTD += look_up(self.positions, positions_BT, options.dtype)
        return constrain(x_BTD, "B T D")


def embed(c: StackConfig, embedding: nnx.Param, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Return the tokens' rows of an embedding, scaled if the model scales them."""
    x_BTD = look_up(embedding, tokens_BT, dtype)
    if c.embedding_scale != 1:
        x_BTD *= jnp.asarray(c.embedding_scale, dtype)  # rounded to the dtype, as Gemma was trained
    return constrain(x_BTD, "B T D")


def logits(c: StackConfig, head_VD: jax.Array, states: jax.Array) -> jax.Array:
    """Return the float32 logits [..., V] of states [..., D]."""
    if c.output_scale != 1:
        states = scale_by(states, c.output_scale)
    logits = jnp.einsum("...D,VD->...V", states, head_VD.astype(states.dtype), preferred_element_type=jnp.float32)
    cap = c.final_logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits
