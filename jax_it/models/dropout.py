"""Dropout, and the keys for it."""

import jax
import jax.numpy as jnp


def split_key(key: jax.Array | None, number: int) -> list[jax.Array | None]:
    """Split a key into a list of keys, or of None if there is none."""
    return [None] * number if key is None else list(jax.random.split(key, number))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Apply inverted dropout; without a key, return `x` itself.

    The rate is rounded to a multiple of 1/256, or of a finer fraction where that would change what is dropped, or kept,
    by more than 2 %. Four elements share one random word, or two: random numbers are most of dropout's cost.
    """
    if key is None or not rate:
        return x
    size, dropped = rounded_rate(rate)
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] * size // 32)), jnp.uint32)
    parts = words if size == 32 else jax.lax.bitcast_convert_type(words, {8: jnp.uint8, 16: jnp.uint16}[size])
    kept = parts.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]] >= jnp.asarray(dropped, parts.dtype)
    return jnp.where(kept, x * jnp.asarray(2**size / (2**size - dropped), x.dtype), 0)


def rounded_rate(rate: float) -> tuple[int, int]:
    """Return (bits, how many of their 2 ** bits values are dropped) for a rate in (0, 1)."""
    for size in (8, 16):
        dropped = round(rate * 2**size)
        if abs(dropped / 2**size - rate) <= 0.02 * min(rate, 1 - rate):
            return size, dropped
    return 32, min(max(round(rate * 2**32), 1), 2**32 - 1)
