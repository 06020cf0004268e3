"""Attention to a cache. On a CPU each row reads as much of the cache as its text is long, not all that it may hold."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_it.models.attention import Scores, plain_attention
from jax_it.models.kv_cache import Cached
from jax_it.sharding import mesh_size

SHORTEST = 256  # positions; each length below the capacity takes time to compile


def attend_to_cache(
    query_BTNH: jax.Array, cached: Cached, scores: Scores, bias_BNTS: jax.Array | None, row_by_row: bool
) -> jax.Array:
    """Do as `plain_attention`; `row_by_row` is for CPUs, where what is not read counts for more than large products.

    A row's result does not depend on other rows then.
    """
    rows = len(query_BTNH)
    # A loop over rows that lie on several devices would move them around.
    if not row_by_row or mesh_size() > 1:
        key_BKHS, value_BKSH = (each[cached.layer][:rows] for each in (cached.key_LBKHS, cached.value_LBKSH))
        return plain_attention(query_BTNH, key_BKHS, value_BKSH, scores, cached.mask_BTS, bias_BNTS)
    kv_heads, head_dim, capacity = cached.key_LBKHS.shape[2:]
    lengths = [capacity]
    while lengths[0] > SHORTEST:
        lengths.insert(0, -(-lengths[0] // 2))

    def of_length(length: int) -> Callable[[jax.Array], jax.Array]:
        def attend(row: jax.Array) -> jax.Array:
            at = cached.layer, row, 0, 0, 0
            key_BKHS = jax.lax.dynamic_slice(cached.key_LBKHS, at, (1, 1, kv_heads, head_dim, length))[0]
            value_BKSH = jax.lax.dynamic_slice(cached.value_LBKSH, at, (1, 1, kv_heads, length, head_dim))[0]
            query, mask = (jax.lax.dynamic_slice_in_dim(each, row, 1) for each in (query_BTNH, cached.mask_BTS))
            bias = None if bias_BNTS is None else jax.lax.dynamic_slice_in_dim(bias_BNTS, row, 1)[..., :length]
            return plain_attention(query, key_BKHS, value_BKSH, scores, mask[..., :length], bias)

        return attend

    def body(row: jax.Array, attended_BTNH: jax.Array) -> jax.Array:
        longer = sum((cached.end_B[row] > length).astype(jnp.int32) for length in lengths[:-1])
        attended = jax.lax.switch(longer, [of_length(length) for length in lengths], row)
        return jax.lax.dynamic_update_slice_in_dim(attended_BTNH, attended, row, 0)

    return jax.lax.fori_loop(0, rows, body, jnp.zeros(query_BTNH.shape, cached.value_LBKSH.dtype))
