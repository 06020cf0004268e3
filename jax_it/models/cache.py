"""What decoding carries from step to step, for encoder-decoders and causal models alike.

Values stand as K S H and keys as K H S: a step reads them head by head, and both of its products go along rows of
memory. The last part of a field's name says which axes its array has, and the functions here find rows and positions by
it. Where a model's layers are gone
through one by one, L is no axis: there is a tuple of arrays, one for each layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models.layers import by_head

Layers = jax.Array | tuple[jax.Array, ...]


class Memory(NamedTuple):
    """What cross-attention reads: keys and values of every layer, and each source position's segment, 0 for padding."""

    key_LBKHS: Layers
    value_LBKSH: Layers
    segments_BS: jax.Array


class Cache(NamedTuple):
    """Keys and values of the tokens so far, each at its own position; row b holds those before its position.

    With n times as many rows as the memory has sources, row b reads source b // n.
    """

    key_LBKHT: Layers
    value_LBKTH: Layers
    memory: Memory | None = None
    # Where a text that outgrows LongRoPE's original length is computed again: its tokens, and whether it has been.
    tokens_BT: jax.Array | None = None
    long_B: jax.Array | None = None


Step = Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


def remember(stacked: nnx.Module, states_BSD: jax.Array, segments_BS: jax.Array) -> Memory:
    """The memory of a source's states: the stacked layers' cross-attention keys and values, made once for all steps."""
    graph, state = nnx.split(stacked)

    def made(state: Any) -> tuple[jax.Array, jax.Array]:
        layer: Any = nnx.merge(graph, state)
        key_BSKH, value_BSKH = layer.cross.keys_values(states_BSD)
        return by_head(key_BSKH, value_BSKH)

    keys, values = jax.lax.map(made, state)
    return Memory(keys, values, segments_BS)


def nothing(
    layers: int, rows: int, heads: int, head_size: int, room: int, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of no tokens yet, with room for some."""
    values = jnp.zeros((layers, rows, heads, room, head_size), dtype)
    return jnp.swapaxes(values, 3, 4), values


def by_layer(cache: Cache) -> Cache:
    """The cache with an array for each layer."""
    keys, values, memory = tuple(cache.key_LBKHT), tuple(cache.value_LBKTH), cache.memory
    if memory is not None:
        memory = memory._replace(key_LBKHS=tuple(memory.key_LBKHS), value_LBKSH=tuple(memory.value_LBKSH))
    return cache._replace(key_LBKHT=keys, value_LBKTH=values, memory=memory)


def room(cache: Cache) -> int:
    """How many positions a row of it has."""
    return cache.key_LBKHT[0].shape[-1]


def prompt_room(cache: Cache) -> int:
    """How many positions there are for prompts: a source's, or those of new tokens among them."""
    return cache.memory.segments_BS.shape[1] if cache.memory else room(cache)


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache whose row b is row `rows_B[b]` of this one. A memory stays, so no row may change its source."""
    return change(_taker(rows_B), cache, of_memory=lambda letters, array: array)


def select(cache: Cache, sources_B: jax.Array, copies: int = 1) -> Cache:
    """The cache with the `copies` rows of each of these sources, and what they read."""
    return change(_taker(rows(sources_B, copies)), cache, of_memory=_taker(sources_B))


def insert(cache: Cache, new: Cache, at_R: jax.Array, from_R: jax.Array, copies: int = 1) -> Cache:
    """The cache with sources `from_R` of another one, with a row for each, in the places `at_R`.

    There each gets `copies` rows, which are alike. Places that are not there take none.
    """

    def put(at_R: jax.Array, from_R: jax.Array) -> Callable[..., jax.Array]:
        def one(letters: str, old: jax.Array, new: jax.Array) -> jax.Array:
            axis = letters.index("B")
            return old.at[(slice(None),) * axis + (at_R,)].set(new.take(from_R, axis), mode="drop")

        return one

    put_rows = put(rows(at_R, copies), jnp.repeat(from_R, copies))
    return change(put_rows, cache, new, of_memory=put(at_R, from_R))


def rows(sources_B: jax.Array, copies: int) -> jax.Array:
    """The rows of some sources that have so many each."""
    return (sources_B[:, None] * copies + jnp.arange(copies)).reshape(-1)


def lengthen(cache: Cache, by: int) -> Cache:
    """The cache with room for prompts that are longer by so many tokens: a source, or what comes before new tokens."""
    grows = "S" if cache.memory else "T"
    return change(lambda letters, array: jnp.pad(array, [(0, by * (letter == grows)) for letter in letters]), cache)


def write(
    keys: Layers, values: Layers, layer: Any, positions_B: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array
) -> tuple[Layers, Layers]:
    """A cache's keys and values with those of one more token a row, T = 1, at the row's position in a layer."""
    row, head, at = jnp.arange(key_BTKH.shape[0])[:, None], jnp.arange(key_BTKH.shape[2]), positions_B[:, None]

    def put(old: Layers, place: tuple, new_BTKH: jax.Array) -> Layers:
        if isinstance(old, tuple):
            return *old[:layer], old[layer].at[place].set(new_BTKH[:, 0]), *old[layer + 1 :]
        return old.at[layer, *place].set(new_BTKH[:, 0])

    return put(keys, (row, head, slice(None), at), key_BTKH), put(values, (row, head, at), value_BTKH)


def change(function: Callable[..., Any], cache: Any, *others: Any, of_memory: Callable[..., Any] | None = None) -> Any:
    """The cache with `function(letters, array, *arrays)` for every array, which comes with the letters of its axes and
    with those of other caches. A memory's arrays are changed by `of_memory`, where that is given.
    """

    def one(name: str, value: Any, *values: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Memory):
            return change(of_memory or function, value, *values)
        letters = name.rsplit("_", 1)[1]
        if isinstance(value, tuple):
            return tuple(function(letters[1:], *layer) for layer in zip(value, *values, strict=True))
        return function(letters, value, *values)

    return type(cache)(*(one(name, *each) for name, *each in zip(cache._fields, cache, *others, strict=True)))


def _taker(rows_B: jax.Array) -> Callable[[str, jax.Array], jax.Array]:
    return lambda letters, array: array.take(rows_B, letters.index("B"))
