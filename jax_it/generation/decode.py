"""Decoding with a key-value cache, in batches of few compiled shapes."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.generation.beam import beam_search
from jax_it.generation.sampling import GREEDY, Sampling, choose
from jax_it.models import Model, Params

SMALLEST = 32  # source positions; longer sources are padded to the next power of 2


class Generator:
    """Generates for one model and one way of choosing tokens; it keeps what was compiled.

    Sources are token ids with the end mark. Sorted by length they fall into few shapes, each compiled
    once; the number of rows is the same in all.
    """

    def __init__(
        self,
        model: Model,
        mesh: jax.sharding.Mesh,
        max_new_tokens: int,
        batch_size: int,
        sampling: Sampling = GREEDY,
    ):
        self._mesh = mesh
        self._end = model.config.end_token
        self._rows = -(-batch_size // sharding.batch_parts(mesh)) * sharding.batch_parts(mesh)
        self._decode = jax.jit(
            partial(_beams if sampling.num_beams > 1 else _sample, model, max_new_tokens, sampling),
            in_shardings=(None, *[sharding.batch_sharding(mesh)] * 3),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, params: Params, sources: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """(index, tokens) of each source, shortest sources first; tokens end before the end mark."""
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        for start in range(0, len(order), self._rows):
            batch = order[start : start + self._rows]
            width = max(SMALLEST, 1 << (len(sources[batch[-1]]) - 1).bit_length())
            filled = batch + batch[:1] * (self._rows - len(batch))  # copies end with their row: nobody waits for them
            source, segments = np.zeros((2, self._rows, width), np.int32)
            for row, i in enumerate(filled):
                source[row, : len(sources[i])] = sources[i]
                segments[row, : len(sources[i])] = 1
            numbers = np.array(filled, np.int32)
            with jax.set_mesh(self._mesh):
                tokens = np.asarray(self._decode(params, source, segments, numbers))
            for row, i in enumerate(batch):
                yield i, _until_end(tokens[row].tolist(), self._end)


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _sample(
    model: Model,
    length: int,
    sampling: Sampling,
    params: Params,
    source_BS: jax.Array,
    segments_BS: jax.Array,
    rows_B: jax.Array,
) -> jax.Array:
    """The tokens [B, T] of greedy decoding or sampling; the end mark repeats to a row's end."""
    config, rows = model.config, source_BS.shape[0]
    cache = model.prefill(params, source_BS, segments_BS, length)

    def unfinished(carry: tuple) -> jax.Array:
        position, _, done_B, _, _ = carry
        return (position < length) & ~done_B.all()

    def advance(carry: tuple) -> tuple:
        position, last_B, done_B, tokens_BT, cache = carry
        logits_BV, cache = model.step(params, last_B, jnp.full(rows, position), cache)
        next_B = choose(logits_BV, sampling, rows_B, position).astype(jnp.int32)
        next_B = jnp.where(done_B, config.end_token, next_B)
        return position + 1, next_B, done_B | (next_B == config.end_token), tokens_BT.at[:, position].set(next_B), cache

    first_B = jnp.full(rows, config.start_token, jnp.int32)
    tokens_BT = jnp.full((rows, length), config.end_token, jnp.int32)
    done_B = jnp.zeros(rows, bool)
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), first_B, done_B, tokens_BT, cache))[3]


def _beams(
    model: Model,
    length: int,
    sampling: Sampling,
    params: Params,
    source_BS: jax.Array,
    segments_BS: jax.Array,
    rows_B: jax.Array,
) -> jax.Array:
    """The best of each row's beams, tokens [B, T]; the end mark repeats to a row's end."""
    config = model.config
    cache = model.prefill(params, source_BS, segments_BS, length)
    return beam_search(
        partial(model.step, params),
        model.take_rows,
        cache,
        rows=source_BS.shape[0],
        length=length,
        num_beams=sampling.num_beams,
        start_token=config.start_token,
        end_token=config.end_token,
        length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping,
    )
