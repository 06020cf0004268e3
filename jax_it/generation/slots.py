"""The slots in which prompts are decoded, and the pure functions over them: prefill, insert, decode_step.

`engine.py` compiles them for each number of slots and width of prompts, and `scheduler.py` decides what to insert and
when. `greedy.py` shows the same for a single prompt.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_it import sharding
from jax_it.generation.beam_search import BeamSearch
from jax_it.generation.requests import PrefillBatch, SlotSettings, slot_settings
from jax_it.generation.sampling import Sampler, counts_of_prompts
from jax_it.models import DecodingWeights, Model, Params, kv_cache

Strategy = Sampler | BeamSearch


class SlotState(NamedTuple):
    """The requests under way, each with one row of the cache, or one for each of its beams.

    A slot whose request is done, or that never had one, stays as it is.
    """

    cache: kv_cache.KVCache
    token_B: jax.Array  # the token that the next step takes, one for each row of the cache
    start_B: jax.Array  # that token's position at the first step, one for each slot
    number_B: jax.Array  # new tokens so far, the end token among them
    settings: SlotSettings
    done_B: jax.Array
    texts: Any  # the strategy's state


def init_slots(model: Model, strategy: Strategy, params: Params, slots: int, capacity: int) -> SlotState:
    """Return slots that are all done, for prompts of at most `capacity` tokens.

    To be compiled: outside of jit, equal arrays may be one, which cannot be donated twice.
    """
    ints_BS, ints_B = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((slots, capacity), (slots,)))
    batch = PrefillBatch(ints_BS, ints_BS, ints_B, ints_B, slot_settings([], slots))
    shapes = jax.eval_shape(partial(prefill, model, strategy), params, batch)

    def zeros(copies: int) -> Any:
        return lambda axes, leaf: jnp.zeros(
            [size * copies if axis == "B" else size for axis, size in zip(axes, leaf.shape, strict=True)], leaf.dtype
        )

    cache = kv_cache.map_axes(zeros(strategy.num_beams), shapes.cache, of_source=zeros(1))
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tuple(shapes[1:]))
    return sharded(SlotState(cache, *rest)._replace(done_B=jnp.ones(slots, bool)))


def prefill(model: Model, strategy: Strategy, params: Params, batch: PrefillBatch) -> SlotState:
    """Return texts with no token yet: the cache of the Q prompts, and everything else for the Y slots."""
    token_Q, position_Q, cache = model.prefill(params, batch.tokens_QS, batch.segments_QS, strategy.max_new_tokens)
    token_Y, start_Y = token_Q[batch.prompts_Y], position_Q[batch.prompts_Y]
    if isinstance(strategy, Sampler) and strategy.prompt_lookup_num_tokens:
        prompts_QT = jnp.pad(batch.tokens_QS, ((0, 0), (0, strategy.max_new_tokens)))
        cache = dataclasses.replace(cache, prompts=prompts_QT)
    counts_YV = None
    if strategy.counts_tokens:  # of a causal model's prompt, or of an encoder-decoder's start token
        read_QS, segments_QS = token_Q[:, None], jnp.ones_like(token_Q[:, None])
        if model.kind == "causal":
            read_QS, segments_QS = batch.tokens_QS, batch.segments_QS
        counts_YV = counts_of_prompts(read_QS, segments_QS, model.config.vocab_size)[batch.prompts_Y]
    none_Y = jnp.zeros_like(start_Y)
    next_Y = jnp.repeat(token_Y, strategy.num_beams)
    return SlotState(cache, next_Y, start_Y, none_Y, batch.settings, none_Y > 0, strategy.begin(token_Y, counts_YV))


def insert(strategy: Strategy, state: SlotState, new: SlotState, batch: PrefillBatch) -> SlotState:
    """Return the slots with prefilled texts in those of the batch."""

    def put(slots: Any, old: Any, new: Any) -> Any:
        return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), old, new)

    cache = kv_cache.grow(new.cache, state.cache.prompt_capacity - new.cache.prompt_capacity)
    cache = kv_cache.insert(state.cache, cache, batch.slots_Y, batch.prompts_Y, strategy.num_beams)
    token_B = put(kv_cache.rows_of(batch.slots_Y, strategy.num_beams), state.token_B, new.token_B)
    return sharded(SlotState(cache, token_B, *put(batch.slots_Y, tuple(state[2:]), tuple(new[2:]))))


def decode_step(
    model: Model, strategy: Strategy, weights: DecodingWeights, state: SlotState, allowed_BA: jax.Array | None
) -> SlotState:
    """Return the slots after one more token in each that is not done."""
    positions_B = jnp.repeat(state.start_B + state.number_B, strategy.num_beams)
    logits_BV, cache = model.decode_step(weights, state.token_B, positions_B, state.cache)
    texts, token_B, rows_B, ended_B = strategy.advance(
        state.texts, state.settings, logits_BV, state.number_B, state.done_B, allowed_BA
    )
    if rows_B is not None:
        cache = kv_cache.take_rows(cache, rows_B)
    # The number of a slot that is done stays; what it still writes to its own rows of the cache is never read.
    number_B = jnp.where(state.done_B, state.number_B, state.number_B + 1)
    done_B = state.done_B | ended_B
    return sharded(SlotState(cache, token_B, state.start_B, number_B, state.settings, done_B, texts))


def decode(
    model: Model,
    strategy: Strategy,
    weights: DecodingWeights,
    state: SlotState,
    idle_B: Any,
    max_steps: Any,
    until_done: Any,
    allowed_BA: Any,
    plain_step: Callable[..., SlotState] | None = None,
) -> tuple[SlotState, tuple[jax.Array, ...]]:
    """Return the slots after up to `max_steps` steps, and what `DecodeResult` holds; idle slots become done.

    It decodes as many of the first slots as `idle_B` has, and all of them with beams; the others stay as they are.
    `allowed_BA` are the tokens that constraints allow, as in `sampling.allow`; None: all texts are plain, and a step is
    `plain_step`, if it is given.
    """

    def unfinished(carry: tuple) -> jax.Array:
        count, state = carry
        return (count < max_steps) & (state.done_B.sum() < until_done)

    def body(carry: tuple) -> tuple:
        count, state = carry
        if plain_step and allowed_BA is None:
            return count + 1, plain_step(model, strategy, weights, state)
        return count + 1, decode_step(model, strategy, weights, state, allowed_BA)

    slots, all_but_cache = len(idle_B), tuple(state[2:])
    rows = slots * strategy.num_beams
    # The cache stays whole, so that its rows are read and written in place.
    first = SlotState(state.cache, state.token_B[:rows], *jax.tree.map(lambda array: array[:slots], all_but_cache))
    first = first._replace(done_B=first.done_B | idle_B)
    first = jax.lax.while_loop(unfinished, body, (jnp.int32(0), first))[1]
    rest = jax.tree.map(lambda old, new: old.at[:slots].set(new), all_but_cache, tuple(first[2:]))
    state = sharded(SlotState(first.cache, state.token_B.at[:rows].set(first.token_B), *rest))
    # Copies, as the state itself will be donated.
    return state, jax.tree.map(jnp.copy, (first.done_B, first.number_B, *strategy.read(first.texts)))


def grow(state: SlotState, by: int) -> SlotState:
    """Return the slots with capacity for prompts that are `by` tokens longer."""
    return sharded(state._replace(cache=kv_cache.grow(state.cache, by)))


def copy(state: SlotState, source: Any, target: Any) -> SlotState:
    """Return the slots with what one has in another one too; not for beams."""
    source_1, target_1 = jnp.asarray([source]), jnp.asarray([target])
    cache = kv_cache.insert(state.cache, kv_cache.select(state.cache, source_1), target_1, jnp.zeros(1, jnp.int32))
    rest = jax.tree.map(lambda array: array.at[target_1].set(array[source_1]), tuple(state[1:]))
    return sharded(SlotState(cache, *rest))


def resize(strategy: Strategy, state: SlotState, slots_B: Any) -> SlotState:
    """Return the state of these slots, in this order."""
    cache = kv_cache.select(state.cache, slots_B, strategy.num_beams)
    token_B = state.token_B[kv_cache.rows_of(slots_B, strategy.num_beams)]
    return sharded(SlotState(cache, token_B, *jax.tree.map(lambda array: array[slots_B], tuple(state[2:]))))


def sharded(state: SlotState) -> SlotState:
    """Split the slots over the devices as the rows of a batch are."""

    def constrain(axes: str, array: jax.Array) -> jax.Array:
        return sharding.constrain(array, " ".join(axes))

    rest = jax.tree.map(lambda array: constrain("B" + "." * (array.ndim - 1), array), tuple(state[1:]))
    return SlotState(kv_cache.map_axes(constrain, state.cache), *rest)
