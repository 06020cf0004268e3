"""Prompts that are prefilled in parts, right in their slots: chunk by chunk, or behind a prefix that is cached.

These are pure functions over the slots, as those of `slots.py`, of causal models alone; `engine.py` compiles them. The
slots under way are done as far as decoding is concerned, and what a step writes for them is the position after what
is computed, which the next chunk overwrites.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_it import sharding
from jax_it.generation.prefix_cache import BLOCK
from jax_it.generation.requests import SlotSettings
from jax_it.generation.sampling import Sampler
from jax_it.generation.slots import SlotState, sharded
from jax_it.models import DecodingWeights, Model, kv_cache

Blocks = tuple[kv_cache.KeyValue, ...]  # keys and values of blocks of tokens: groups whose rows are blocks


class ChunkBatch(NamedTuple):
    """The next tokens of Q prompts; a slot number of B or more is padding."""

    tokens_QT: Any
    segments_QT: Any  # 1, and 0 for padding
    slots_Q: Any
    start_Q: Any  # how many tokens are in the cache


def extend(model: Model, weights: DecodingWeights, state: SlotState, batch: ChunkBatch) -> SlotState:
    """Return the slots with more tokens of their prompts in the cache."""
    slots_Q = jnp.minimum(batch.slots_Q, len(state.done_B) - 1)

    def clear(axes: str, array: jax.Array) -> jax.Array:
        # What a slot's last text left would not be seen; but where it is not finite, it would count.
        is_new = (batch.start_Q == 0).reshape([-1 if axis == "B" else 1 for axis in axes])
        return jnp.where(is_new, 0, array)

    rows = kv_cache.map_axes(clear, kv_cache.select(state.cache, slots_Q))
    _, rows = model.extend(weights, batch.tokens_QT, batch.segments_QT, batch.start_Q, rows)
    cache = kv_cache.insert(state.cache, rows, batch.slots_Q, jnp.arange(len(slots_Q)))
    return _wait(state._replace(cache=cache), batch.slots_Q, batch.start_Q + batch.segments_QT.sum(1))


def begin(
    strategy: Sampler, state: SlotState, slot: Any, token: Any, position: Any, counts_V: Any, settings: SlotSettings
) -> SlotState:
    """Start the text of a slot, whose cache has all of the prompt before its last token, at `position`."""
    token_Y, slot_Y = jnp.asarray([token], jnp.int32), jnp.asarray([slot])
    texts = strategy.begin(token_Y, counts_V[None])
    new = (token_Y, jnp.asarray([position], jnp.int32), jnp.zeros(1, jnp.int32), settings, jnp.zeros(1, bool), texts)
    rest = jax.tree.map(lambda old, new: old.at[slot_Y].set(new), tuple(state[1:]), new)
    return sharded(SlotState(state.cache, *rest))


def init_blocks(state: SlotState, number: int) -> Blocks:
    """Return room for a number of blocks."""

    def zeros(axes: str, array: jax.Array) -> jax.Array:
        sizes = {"B": number, "T": BLOCK}
        shape = [sizes.get(axis, size) for axis, size in zip(axes, array.shape, strict=True)]
        return sharding.constrain(jnp.zeros(shape, array.dtype), " ".join(axes))

    return kv_cache.map_axes(zeros, state.cache.groups)


def load_prefix(state: SlotState, blocks: Blocks, slot: Any, numbers_A: Any, length: Any) -> SlotState:
    """Return the slots with blocks as a slot's cache; those after `length` tokens are padding."""

    def put(axes: str, old: jax.Array, blocks: jax.Array) -> jax.Array:
        b, t = axes.index("B"), axes.index("T")
        parts = jnp.moveaxis(blocks.take(numbers_A, b), b, t - 1)  # blocks beside their tokens, without B
        row = parts.reshape(*parts.shape[: t - 1], -1, *parts.shape[t + 1 :])
        row = jnp.pad(row, [(0, (old.shape[t] - row.shape[i]) * (i == t - 1)) for i in range(row.ndim)])
        is_known = (jnp.arange(old.shape[t]) < length).reshape([-1 if i == t - 1 else 1 for i in range(row.ndim)])
        return jax.lax.dynamic_update_index_in_dim(old, jnp.where(is_known, row, 0), slot, b)

    groups = kv_cache.map_axes(put, state.cache.groups, blocks)
    state = state._replace(cache=dataclasses.replace(state.cache, groups=groups))
    return _wait(state, jnp.asarray([slot]), jnp.asarray([length]))


def save_prefix(blocks: Blocks, state: SlotState, slot: Any, numbers_A: Any) -> Blocks:
    """Return the blocks with the beginning of a slot's cache in those with these numbers; others take none."""

    def put(axes: str, old: jax.Array, cached: jax.Array) -> jax.Array:
        b, t = axes.index("B"), axes.index("T")
        row = jax.lax.dynamic_index_in_dim(cached, slot, b, keepdims=False)
        row = jax.lax.slice_in_dim(row, 0, len(numbers_A) * BLOCK, axis=t - 1)
        parts = row.reshape(*row.shape[: t - 1], -1, BLOCK, *row.shape[t:])
        return old.at[(slice(None),) * b + (numbers_A,)].set(jnp.moveaxis(parts, t - 1, b), mode="drop")

    return kv_cache.map_axes(put, blocks, state.cache.groups)


def _wait(state: SlotState, slots_Q: jax.Array, position_Q: jax.Array) -> SlotState:
    """Return the slots with some that do not decode, and of which a step writes no position but the given one."""
    return sharded(
        state._replace(
            token_B=state.token_B.at[slots_Q].set(0, mode="drop"),  # whatever it was, it may not be finite
            start_B=state.start_B.at[slots_Q].set(position_Q, mode="drop"),
            number_B=state.number_B.at[slots_Q].set(0, mode="drop"),
            done_B=state.done_B.at[slots_Q].set(True, mode="drop"),
        )
    )
