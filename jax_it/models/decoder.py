"""The decoder that causal language models share, and its layers, which T5Gemma is made of; `families/` says how
each of them varies it.

Layers are stacked and scanned. What differs between the layers of one model, such as the window of its
attention, is an array over layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import fused, layers, rope
from jax_it.models.cache import Cache, Step, change, lengthen, room, write
from jax_it.models.experts import Routing
from jax_it.models.family import Run
from jax_it.models.layers import Norm, attend, attend_cached, split_key
from jax_it.models.linear import dropout, look_up
from jax_it.models.transformer import Attention, Config, Layer
from jax_it.sharding import constrain

WITHOUT_WINDOW = 1 << 30  # positions


class Source(NamedTuple):
    """What cross-attention reads when all positions are computed, and which of it each of them sees."""

    states_BSD: jax.Array  # a source's blocks as rows of their own
    allowed_BTS: jax.Array


class Stack(nnx.Module):
    """A model's layers and the norm after them, from embedded tokens to states."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.layers: Any = layers.stack(lambda rngs: Layer(c, rngs=rngs), c.layers, rngs)
        self.norm = Norm(c.norm, (c.width,), c.epsilon)

    def scan(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, allowed_BTS: jax.Array, run: Run,
        key: jax.Array | None = None, *, extents_BT: jax.Array | None = None, source: Source | None = None,
        with_cache: bool = False,
    ) -> tuple[jax.Array, Routing | None, Any]:  # fmt: skip
        """Normed states of all positions, the routing summed over layers, and every layer's keys and values."""
        c, length = self.config, x_BTD.shape[1]
        allowed_BTS = constrain(allowed_BTS, "B T S")
        distance_TS = jnp.arange(length)[:, None] - jnp.arange(length)
        if c.bidirectional:
            distance_TS = jnp.abs(distance_TS)
        turns = self._rotations(positions_BT, extents_BT)
        first, rest = split_key(key, 2)
        keys = None if rest is None else jax.random.split(rest, c.layers)
        graph, state = nnx.split(self.layers)
        causal = not (c.bidirectional or run.prefix_lm)
        in_one_kernel = (
            run.fused and causal and not (run.dropout and key is not None)
            and len(set(c.windows)) <= 1 and fused.fits(length, c.heads, c.key_heads, c.head_size)
        )  # fmt: skip

        def body(x_BTD: jax.Array, xs: tuple) -> tuple[jax.Array, tuple]:
            state, varied, key = xs
            module = nnx.merge(graph, state)
            (cos, sin), window = self._variation(turns, varied)
            attention_key, layer_key = split_key(key, 2)
            kept: list[jax.Array] = []

            def attention(x_BTD: jax.Array) -> jax.Array:
                query_BTNH, key_BTKH, value_BTKH = _heads(module.attention, x_BTD, cos, sin)
                kept.extend((key_BTKH, value_BTKH))
                if in_one_kernel:
                    attended = fused.attend(
                        query_BTNH, key_BTKH, value_BTKH, segments_BT, window=window, scale=_score_scale(c),
                        cap=c.score_cap, interpret=run.fused == "interpret",
                    )  # fmt: skip
                    return module.attention.project(attended)
                attended = attend(
                    query_BTNH, key_BTKH, value_BTKH,
                    mask_BTS=allowed_BTS & (distance_TS < window) if c.windows else allowed_BTS, causal=causal,
                    scale=_score_scale(c), cap=c.score_cap, dropout_rate=run.dropout,
                    dropout_key=attention_key if c.inner_dropout == "attention" else None,
                )  # fmt: skip
                return module.attention.project(attended)

            def cross(x_BTD: jax.Array) -> jax.Array:
                assert source is not None
                key, value = (
                    layers.keys_of_all(x, x_BTD.shape[0]) for x in module.cross.keys_values(source.states_BSD)
                )
                return _read(c, module.cross, x_BTD, attend, key, value, source.allowed_BTS)

            x_BTD, routing = module(c, x_BTD, attention, cross, segments_BT > 0, run.dropout, layer_key)
            return x_BTD, (routing, layers.by_head(*kept) if with_cache else None)

        x_BTD = dropout(x_BTD, run.dropout, first)
        xs = (state, self._varied(), keys)
        x_BTD, (routing, cache) = jax.lax.scan(jax.checkpoint(body) if run.remat else body, x_BTD, xs)
        return self.norm(x_BTD), jax.tree.map(lambda layers: layers.sum(0), routing), cache

    def stepper(self, run: Run) -> Step:
        """`step(x_BTD, positions_B, cache)`: normed states [B, D] of one more token a row, at its own position, and
        the new cache.
        """
        c, varied = self.config, self._varied()

        def step(x_BTD: jax.Array, positions_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            memory = cache.memory
            distance_BTS = (positions_B[:, None] - jnp.arange(room(cache)))[:, None]
            turns = self._rotations(positions_B[:, None], positions_B[:, None] + 1)

            def layer(carry: tuple, number: Any, module: Any) -> tuple:
                x_BTD, *cached = carry  # keys and values
                (cos, sin), window = self._variation(turns, jax.tree.map(lambda each: each[number], varied))

                def attention(x_BTD: jax.Array) -> jax.Array:
                    query_BTNH, key_BTKH, value_BTKH = _heads(module.attention, x_BTD, cos, sin)
                    # Carried along and written in place: a cache that is read and returned by layers would be copied.
                    keys, values = cached[:] = write(cached[0], cached[1], number, positions_B, key_BTKH, value_BTKH)
                    attended = attend_cached(
                        query_BTNH, keys[number], values[number],
                        mask_BTS=(distance_BTS >= 0) & (distance_BTS < window), scale=_score_scale(c), cap=c.score_cap,
                    )  # fmt: skip
                    return module.attention.project(attended)

                def cross(x_BTD: jax.Array) -> jax.Array:
                    assert memory is not None
                    key, value = memory.key_LBKHS[number], memory.value_LBKSH[number]
                    return _read(c, module.cross, x_BTD, attend_cached, key, value, memory.segments_BS[:, None] > 0)

                x_BTD, _ = module(c, x_BTD, attention, cross, jnp.ones(x_BTD.shape[:2], bool), 0.0, None)
                return x_BTD, *cached

            start = (x_BTD, cache.key_LBKHT, cache.value_LBKTH)
            x_BTD, keys, values = layers.in_order(self.layers, layer, start)
            return self.norm(x_BTD[:, 0]), cache._replace(key_LBKHT=keys, value_LBKTH=values)

        return step

    def _rotations(self, positions_BT: jax.Array, extents_BT: jax.Array | None) -> Any:
        """Cosines and sines [ropes, B, T, pairs]; None without ropes."""
        if not self.config.ropes:
            return None
        return jax.tree.map(lambda *each: jnp.stack(each), *rope.rotations(self.config.ropes, positions_BT, extents_BT))

    def _varied(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Arrays over layers of what differs between them: which rope, and the window; None for what does not."""
        c = self.config
        ropes = jnp.asarray(c.layer_ropes) if len(set(c.layer_ropes)) > 1 else None
        windows = jnp.asarray([window or WITHOUT_WINDOW for window in c.windows]) if len(set(c.windows)) > 1 else None
        return ropes, windows

    def _variation(self, turns: Any, varied: tuple[Any, Any]) -> tuple[Any, Any]:
        """A layer's (cosine, sine) and its window."""
        c = self.config
        which, window = varied
        if which is None:
            which = (c.layer_ropes or (0,))[0]
        if window is None:  # a number of Python's, which the kernel's mask takes
            window = (c.windows or (0,))[0] or WITHOUT_WINDOW
        return (None, None) if turns is None else (turns[0][which], turns[1][which]), window


class Decoder(Stack):
    """A causal language model."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.embedding = layers.normal(rngs, (c.vocabulary, c.width), 0.02 if c.embedding_scale == 1 else c.width**-0.5)
        if c.positions:
            self.positions = layers.normal(rngs, (c.positions, c.width), 0.02)
        if not c.tied:
            self.head = layers.normal(rngs, (c.vocabulary, c.width), c.width**-0.5)
        super().__init__(c, rngs=rngs)

    def __call__(self, batch: Any, run: Run, key: jax.Array | None = None) -> jax.Array:
        """States before the head, [B, T, D], of a CausalBatch; dropout where a key is given."""
        return self.states(batch, run, key)[0]

    def states(self, batch: Any, run: Run, key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """The states, and how the router of a mixture of experts sent the tokens, summed over layers."""
        allowed_BTS = causal_mask(batch.segments_BT, batch.prefix_BT)
        x_BTD = self._embed(batch.tokens_BT, batch.positions_BT, run)
        extents_BT = None
        if self.config.original_length:
            extents_BT = (batch.segments_BT[:, :, None] == batch.segments_BT[:, None]).sum(-1)
        x_BTD, routing, _ = self.scan(
            x_BTD, batch.positions_BT, batch.segments_BT, allowed_BTS, run, key, extents_BT=extents_BT
        )
        return x_BTD, routing

    def prefill(
        self, tokens_BS: jax.Array, segments_BS: jax.Array, length: int, run: Run
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """(last tokens [B], their positions [B], cache) for at most `length` tokens after each prompt.

        The first step takes a prompt's last token, whose state it computes again.
        """
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        prefix_BS = segments_BS if run.prefix_lm else None
        allowed_BTS = causal_mask(segments_BS, prefix_BS)
        x_BSD = self._embed(tokens_BS, positions_BS, run)
        last_B = jnp.maximum((segments_BS > 0).sum(1) - 1, 0)
        _, _, (keys, values) = self.scan(
            x_BSD, positions_BS, segments_BS, allowed_BTS, run, extents_BT=last_B[:, None] + 1, with_cache=True
        )
        first_B = jnp.take_along_axis(tokens_BS, last_B[:, None], axis=1)[:, 0]
        cache = Cache(keys, values)
        if self.config.original_length and self.config.computed_again:
            cache = cache._replace(tokens_BT=tokens_BS, long_B=last_B >= self.config.original_length)
        return first_B, last_B, lengthen(cache, length)

    def stepper(self, run: Run) -> Step:
        """States [B, D] after one more token a row, at its own position, and the new cache."""
        step = super().stepper(run)

        def of_token(tokens_B: jax.Array, positions_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            if cache.tokens_BT is not None:
                tokens_BT = cache.tokens_BT.at[jnp.arange(tokens_B.size), positions_B].set(tokens_B)
                cache = self._grown_long(cache._replace(tokens_BT=tokens_BT), positions_B, run)
            return step(self._embed(tokens_B[:, None], positions_B[:, None], run), positions_B, cache)

        return of_token

    def _grown_long(self, cache: Cache, positions_B: jax.Array, run: Run) -> Cache:
        """The cache in which the texts that outgrow LongRoPE's original length with this position are computed again,
        as Transformers does: all of a text rotates by the same frequencies.
        """
        assert cache.tokens_BT is not None and cache.long_B is not None
        grown_B = (positions_B >= self.config.original_length) & ~cache.long_B

        def again(cache: Cache) -> Cache:
            assert cache.tokens_BT is not None and cache.long_B is not None
            places_BT = jnp.broadcast_to(jnp.arange(room(cache)), cache.tokens_BT.shape)
            segments_BT = (places_BT <= positions_B[:, None]).astype(jnp.int32)
            x_BTD = self._embed(cache.tokens_BT, places_BT, run)
            _, _, (keys, values) = self.scan(
                x_BTD, places_BT, segments_BT, causal_mask(segments_BT), run, extents_BT=positions_B[:, None] + 1,
                with_cache=True,
            )  # fmt: skip
            new = cache._replace(key_LBKHT=keys, value_LBKTH=values, long_B=cache.long_B | grown_B)

            def choose(letters: str, old: jax.Array, new: jax.Array) -> jax.Array:
                ones = [-1 if letter == "B" else 1 for letter in letters]
                return jnp.where(grown_B.reshape(ones), new.astype(old.dtype), old)

            return change(choose, cache, new)

        return jax.lax.cond(grown_B.any(), again, lambda cache: cache, cache)

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, run: Run) -> jax.Array:
        x_BTD = embed(self.config, self.embedding, tokens_BT, run.dtype)
        if self.config.positions:
            x_BTD += look_up(self.positions, positions_BT, run.dtype)
        return constrain(x_BTD, "B T D")


def embed(c: Config, embedding: nnx.Param, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """The tokens' rows of an embedding, scaled where the model scales them."""
    x_BTD = look_up(embedding, tokens_BT, dtype)
    if c.embedding_scale != 1:
        x_BTD *= jnp.asarray(c.embedding_scale, dtype)  # rounded to the dtype, as Gemma was trained
    return constrain(x_BTD, "B T D")


def _heads(attention: Attention, x_BTD: jax.Array, cos: Any, sin: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, rotated where the model rotates."""
    query_BTNH, (key_BTKH, value_BTKH) = attention.queries(x_BTD), attention.keys_values(x_BTD)
    if cos is not None:
        query_BTNH, key_BTKH = rope.rotate(query_BTNH, cos, sin), rope.rotate(key_BTKH, cos, sin)
    rows = x_BTD.shape[0]
    return constrain(query_BTNH, "B T N H"), layers.keys_of_all(key_BTKH, rows), layers.keys_of_all(value_BTKH, rows)


def _read(
    c: Config, cross: Attention, x_BTD: jax.Array, attention: Callable[..., jax.Array], key: jax.Array,
    value: jax.Array, allowed_BTS: jax.Array,
) -> jax.Array:  # fmt: skip
    """Cross-attention to keys and values. The rows of one source, if several, are taken as its query positions."""
    query_BTNH = constrain(cross.queries(x_BTD), "B T N H")
    by_source = query_BTNH.reshape(key.shape[0], -1, *query_BTNH.shape[2:])
    attended = attention(by_source, key, value, mask_BTS=allowed_BTS, scale=_score_scale(c), cap=c.score_cap)
    return cross.project(attended.reshape(query_BTNH.shape))


def _score_scale(c: Config) -> float:
    return c.head_size**-0.5 if c.score_scale is None else c.score_scale


def causal_mask(segments_BT: jax.Array, prefix_BT: jax.Array | None = None) -> jax.Array:
    """Where position t may see s, [B, T, S]: in its segment, not after it, or both in the segment's prefix."""
    length = segments_BT.shape[1]
    seen_BTS = jnp.tri(length, dtype=bool)[None]
    if prefix_BT is not None:
        seen_BTS = seen_BTS | ((prefix_BT[:, :, None] > 0) & (prefix_BT[:, None] > 0))
    return seen_BTS & (segments_BT[:, :, None] == segments_BT[:, None])


def head_logits(c: Config, head_VD: jax.Array, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of states [..., D]."""
    logits = jnp.einsum("...D,VD->...V", hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return c.logit_cap * jnp.tanh(logits / c.logit_cap) if c.logit_cap else logits
