"""Decoding in slots: a prompt that is done gives its place in the batch to the next one, and nobody waits for it.

The functions here are pure, and compiled once for each number of slots and width of prompts. Dimension letters beside
those of models/layers.py: B slots, P prompts that come in together, R slots that they are given.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_it import sharding
from jax_it.generation.beam import Beams
from jax_it.generation.sampling import OneByOne
from jax_it.models import Model, Params, Prepared
from jax_it.models.kv_cache import KVCache, grow, insert, map_axes, rows_of, select, take_rows

Search = OneByOne | Beams


class Slots(NamedTuple):
    """The prompts under way, each with one row of the cache, or one for each of its beams.

    A slot whose prompt is done, or that never had one, stays as it is.
    """

    cache: KVCache
    last_B: jax.Array  # the token that the next step takes, a row
    start_B: jax.Array  # the position of the first one, a slot
    number_B: jax.Array  # tokens made so far, the end mark among them
    limit_B: jax.Array  # and at most
    done_B: jax.Array
    texts: Any  # what the search knows of them


class Arrivals(NamedTuple):
    """Prompts that come in, and the slots that they get; slot B and beyond are none."""

    prompts_PS: Any
    segments_PS: Any
    slots_R: Any
    prompts_R: Any  # which of the prompts
    rows_R: Any  # the text's number, which its draws depend on
    limits_R: Any


def empty(model: Model, search: Search, number: int, width: int, params: Params) -> Slots:
    """Slots that are all done, for prompts of at most `width` tokens. To be compiled: arrays that are alike must not be
    one, since each is donated.
    """
    tokens = jax.ShapeDtypeStruct((number, width), jnp.int32)
    shapes = jax.eval_shape(
        lambda params, prompts, segments: model.prefill(params, prompts, segments, search.length)[2],
        params,
        tokens,
        tokens,
    )

    def zeros(copies: int) -> Any:
        return lambda letters, leaf: jnp.zeros(
            [size * copies if letter == "B" else size for letter, size in zip(letters, leaf.shape, strict=True)],
            leaf.dtype,
        )

    cache = map_axes(zeros(search.beams), shapes, of_source=zeros(1))
    nothing_B = jnp.zeros(number, jnp.int32)
    texts = search.begin(nothing_B, nothing_B, _nothing_seen(model, search, number))
    last_B = jnp.zeros(number * search.beams, jnp.int32)
    return _placed(Slots(cache, last_B, nothing_B, nothing_B, nothing_B, jnp.ones(number, bool), texts))


def fill(model: Model, search: Search, params: Params, slots: Slots, new: Arrivals) -> Slots:
    """The slots with the texts of new prompts begun in some of them."""
    first_P, start_P, cache = model.prefill(params, new.prompts_PS, new.segments_PS, search.length)
    first_R = first_P[new.prompts_R]

    def put(old: jax.Array, values_R: Any) -> jax.Array:
        return old.at[new.slots_R].set(values_R, mode="drop")

    seen_PV = _nothing_seen(model, search, len(start_P))
    if seen_PV is not None:
        each = jnp.arange(len(start_P))[:, None]
        if model.kind == "causal":
            times_PV = jnp.zeros(seen_PV.shape, jnp.int32).at[each, new.prompts_PS].add(new.segments_PS)
            seen_PV = times_PV > 0
        else:
            seen_PV = seen_PV.at[each, first_P[:, None]].set(True)
    begun = search.begin(first_R, new.rows_R, None if seen_PV is None else seen_PV[new.prompts_R])
    cache = grow(cache, slots.cache.prompt_capacity - cache.prompt_capacity)
    return _placed(
        Slots(
            cache=insert(slots.cache, cache, new.slots_R, new.prompts_R, search.beams),
            last_B=slots.last_B.at[rows_of(new.slots_R, search.beams)].set(
                jnp.repeat(first_R, search.beams), mode="drop"
            ),
            start_B=put(slots.start_B, start_P[new.prompts_R]),
            number_B=put(slots.number_B, 0),
            limit_B=put(slots.limit_B, new.limits_R),
            done_B=put(slots.done_B, False),
            texts=jax.tree.map(put, slots.texts, begun),
        )
    )


def advance(
    model: Model, search: Search, ready: Prepared, slots: Slots, idle_B: Any, until_done: Any, steps: Any
) -> Slots:
    """The slots after as many steps as it takes until so many of them are done, or after `steps`.

    Those of `idle_B` are done already.
    """

    def unfinished(carry: tuple) -> jax.Array:
        count, slots = carry
        return (count < steps) & (slots.done_B.sum() < until_done)

    def body(carry: tuple) -> tuple:
        count, slots = carry
        positions_B = jnp.repeat(slots.start_B + slots.number_B, search.beams)
        logits_BV, cache = model.decode_step(ready, slots.last_B, positions_B, slots.cache)
        texts, last_B, rows_B, over_B = search.advance(
            slots.texts, logits_BV, slots.number_B, slots.limit_B, slots.done_B
        )
        if rows_B is not None:
            cache = take_rows(cache, rows_B)
        new = slots._replace(
            cache=cache,
            last_B=last_B,
            # Of a slot that is done it no longer moves, and so neither does the place that it writes to.
            number_B=jnp.where(slots.done_B, slots.number_B, slots.number_B + 1),
            done_B=slots.done_B | over_B,
            texts=texts,
        )
        return count + 1, _placed(new)

    start = slots._replace(done_B=slots.done_B | idle_B)
    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), start))[1]


def widen(slots: Slots, by: int) -> Slots:
    """The slots with room for prompts that are longer by so many tokens."""
    return _placed(slots._replace(cache=grow(slots.cache, by)))


def keep(search: Search, slots: Slots, slots_B: Any) -> Slots:
    """Some of the slots, in this order."""
    start_B, number_B, limit_B, done_B, texts = jax.tree.map(lambda array: array[slots_B], tuple(slots[2:]))
    cache, last_B = select(slots.cache, slots_B, search.beams), slots.last_B[rows_of(slots_B, search.beams)]
    return _placed(Slots(cache, last_B, start_B, number_B, limit_B, done_B, texts))


def _nothing_seen(model: Model, search: Search, number: int) -> jax.Array | None:
    """Which tokens each of so many texts has had; None where nobody asks."""
    if search.sampling.repetition_penalty == 1:
        return None
    return jnp.zeros((number, model.config.vocabulary), bool)


def _placed(slots: Slots) -> Slots:
    """The slots shared out to the devices: each has the rows of its part of a batch."""
    cache = map_axes(_constrain, slots.cache)
    return Slots(cache, *jax.tree.map(lambda array: _constrain("B" + "." * (array.ndim - 1), array), tuple(slots[1:])))


def _constrain(letters: str, array: jax.Array) -> jax.Array:
    return sharding.constrain(array, " ".join(letters))
