"""Dropout, and the keys for it."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p


def split_key(key: jax.Array | None, number: int) -> list[jax.Array | None]:
    """Split a key into a list of keys, or of None if there is none."""
    return [None] * number if key is None else list(jax.random.split(key, number))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Apply inverted dropout; without a key, return `x` itself.

    The rate is rounded to a multiple of 1/256, or of a finer fraction where that would change what is dropped, or kept,
    by more than 2 %.
    """
    return keep(x, rate, random_bits(x.shape, rate, key))


def random_bits(shape: tuple[int, ...], rate: float, key: jax.Array | None) -> jax.Array | None:
    """Draw what `keep` decides by, an unsigned integer for each element; None where nothing is dropped.

    Random numbers are most of dropout's cost. So an element takes 8 or 16 bits where that is enough for the rate, and
    both words of a threefry hash are used, of which `jax.random.bits` makes one. The hash is of an element's indices:
    the bits do not depend on how the array is sharded.
    """
    if key is None or not rate:
        return None
    (*leading, last), (size, _) = shape, rounded_rate(rate)
    row = jnp.zeros((*leading, 1), jnp.uint32)
    for axis, length in enumerate(leading):
        row = row * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis)
    column = jax.lax.broadcasted_iota(jnp.uint32, (*leading, -(-last * size // 64)), len(leading))
    first, second = jnp.broadcast_to(jax.random.key_data(key)[:2, *(None,) * len(shape)], (2, *column.shape))
    words = jnp.concatenate(threefry2x32_p.bind(first, second, jnp.broadcast_to(row, column.shape), column), -1)
    parts = words if size == 32 else jax.lax.bitcast_convert_type(words, {8: jnp.uint8, 16: jnp.uint16}[size])
    return parts.reshape(*leading, -1)[..., :last]


def keep(x: jax.Array, rate: float, bits: jax.Array | None) -> jax.Array:
    """Drop the elements of `x` whose random bits say so, and scale the others."""
    if bits is None:
        return x
    size, dropped = rounded_rate(rate)
    kept = bits >= jnp.asarray(dropped, bits.dtype)
    return jnp.where(kept, x * jnp.asarray(2**size / (2**size - dropped), x.dtype), 0)


def rounded_rate(rate: float) -> tuple[int, int]:
    """Return (bits, how many of their 2 ** bits values are dropped) for a rate in (0, 1)."""
    for size in (8, 16):
        dropped = round(rate * 2**size)
        if abs(dropped / 2**size - rate) <= 0.02 * min(rate, 1 - rate):
            return size, dropped
    return 32, min(max(round(rate * 2**32), 1), 2**32 - 1)
