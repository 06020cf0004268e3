"""What decoding carries from step to step, for encoder-decoders and causal models alike.

Keys stand as K S H, each head's positions together: a step reads them head by head. The last part of a field's name
says which axes its array has, and the functions here find rows and positions by it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Memory(NamedTuple):
    """What cross-attention reads: keys and values of every layer, and each source position's segment, 0 for padding."""

    key_LBKSH: jax.Array
    value_LBKSH: jax.Array
    segments_BS: jax.Array


class Cache(NamedTuple):
    """Keys and values of the tokens so far, each at its own position; row b holds those before its position.

    With n times as many rows as the memory has sources, row b reads source b // n.
    """

    key_LBKTH: jax.Array
    value_LBKTH: jax.Array
    memory: Memory | None = None
    extent_B: jax.Array | None = None  # how many positions each text may have in all, where its rotation depends on it


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache whose row b is row `rows_B[b]` of this one. A memory stays, so no row may change its source."""
    return _map(lambda letters, array: array.take(rows_B, letters.index("B")), cache._replace(memory=None))._replace(
        memory=cache.memory
    )


def write(cached_LBKTH: jax.Array, layer: Any, positions_B: jax.Array, new_BKH: jax.Array) -> jax.Array:
    """Keys or values with those of one more token a row, at the row's position in a layer."""
    rows, heads = jnp.arange(new_BKH.shape[0])[:, None], jnp.arange(new_BKH.shape[1])
    return cached_LBKTH.at[layer, rows, heads, positions_B[:, None]].set(new_BKH)


def by_head(*arrays_BSKH: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values in the order of axes that a cache has."""
    return tuple(jnp.swapaxes(array, 1, 2) for array in arrays_BSKH)


def _map(change: Callable[[str, jax.Array], jax.Array], cache: Any) -> Any:
    """The cache with every array changed, which comes with the letters of its axes."""

    def one(name: str, value: Any) -> Any:
        if value is None:
            return None
        return _map(change, value) if isinstance(value, Memory) else change(name.rsplit("_", 1)[1], value)

    return type(cache)(*(one(name, value) for name, value in zip(cache._fields, cache, strict=True)))
