"""Decoding with a key-value cache, in batches of few compiled shapes."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.generation.beam import beam_search
from jax_it.generation.sampling import GREEDY, Sampling, choose, is_end
from jax_it.models import Model, Params
from jax_it.models.cache import take_rows

SMALLEST = 32  # positions of a prompt; longer ones are padded to the next power of 2


class Generator:
    """Generates for one model and one way of choosing tokens; it keeps what was compiled.

    Prompts are token ids: an encoder-decoder's source with its end mark, or what a causal model goes on from.
    Sorted by length they fall into few shapes, each compiled once; the number of rows is the same in all.
    A text ends at one of the model's end tokens or of the `ends` given beside them.
    """

    def __init__(
        self,
        model: Model,
        mesh: jax.sharding.Mesh,
        max_new_tokens: int,
        batch_size: int,
        sampling: Sampling = GREEDY,
        ends: Collection[int] = (),
    ):
        self._mesh = mesh
        self._ends = tuple(dict.fromkeys([*model.config.end_tokens, *ends]))
        if not self._ends:
            raise ValueError("no end token: texts would never end")
        self._rows = -(-batch_size // sharding.batch_parts(mesh)) * sharding.batch_parts(mesh)
        self._decode = jax.jit(
            partial(_beams if sampling.num_beams > 1 else _sample, model, max_new_tokens, self._ends, sampling),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, params: Params, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """(index, tokens) of each prompt, shortest prompts first; tokens end before the end mark."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self._rows):
            batch = order[start : start + self._rows]
            width = max(SMALLEST, 1 << (len(prompts[batch[-1]]) - 1).bit_length())
            filled = batch + batch[:1] * (self._rows - len(batch))  # copies end with their row: nobody waits for them
            tokens, segments = np.zeros((2, self._rows, width), np.int32)
            for row, i in enumerate(filled):
                tokens[row, : len(prompts[i])] = prompts[i]
                segments[row, : len(prompts[i])] = 1
            arrays = sharding.place((tokens, segments, np.array(filled, np.int32)), self._mesh)
            with jax.set_mesh(self._mesh):
                made = np.asarray(self._decode(params, *arrays))
            for row, i in enumerate(batch):
                yield i, list(takewhile(lambda token: token not in self._ends, made[row].tolist()))


def _sample(
    model: Model,
    length: int,
    ends: tuple[int, ...],
    sampling: Sampling,
    params: Params,
    prompts_BS: jax.Array,
    segments_BS: jax.Array,
    rows_B: jax.Array,
) -> jax.Array:
    """The tokens [B, T] of greedy decoding or sampling; the end mark repeats to a row's end."""
    first_B, start_B, cache = model.prefill(params, prompts_BS, segments_BS, length)

    def unfinished(carry: tuple) -> jax.Array:
        number, _, done_B, _, _ = carry
        return (number < length) & ~done_B.all()

    def advance(carry: tuple) -> tuple:
        number, last_B, done_B, tokens_BT, cache = carry
        logits_BV, cache = model.step(params, last_B, start_B + number, cache)
        next_B = choose(logits_BV, sampling, rows_B, number).astype(jnp.int32)
        next_B = jnp.where(done_B, ends[0], next_B)
        return number + 1, next_B, done_B | is_end(next_B, ends), tokens_BT.at[:, number].set(next_B), cache

    tokens_BT = jnp.full((prompts_BS.shape[0], length), ends[0], jnp.int32)
    done_B = jnp.zeros(prompts_BS.shape[0], bool)
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), first_B, done_B, tokens_BT, cache))[3]


def _beams(
    model: Model,
    length: int,
    ends: tuple[int, ...],
    sampling: Sampling,
    params: Params,
    prompts_BS: jax.Array,
    segments_BS: jax.Array,
    rows_B: jax.Array,
) -> jax.Array:
    """The best of each row's beams, tokens [B, T]; the end mark repeats to a row's end."""
    first_B, start_B, cache = model.prefill(params, prompts_BS, segments_BS, length)
    start_BK = jnp.repeat(start_B, sampling.num_beams)
    return beam_search(
        lambda tokens_B, number, cache: model.step(params, tokens_B, start_BK + number, cache),
        take_rows,
        cache,
        first_B=first_B,
        length=length,
        num_beams=sampling.num_beams,
        end_tokens=ends,
        length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping,
    )
