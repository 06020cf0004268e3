"""Attention of all positions at once: one call, `attend`, over implementations chosen by shape and platform.

Each computes what `attention.plain_attention` does: that itself, row by row on a CPU, on TPUs a kernel (JAX's splash
attention or our flash attention), and for long rows block by block of queries, so that not all scores are in memory at
once.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jax_it.models import splash_attention
from jax_it.models.attention import Mask, Scores, by_head, plain_attention
from jax_it.models.config import ComputeOptions
from jax_it.models.dropout import split_key
from jax_it.models.relative_bias import DistanceBias
from jax_it.models.row_attention import row_attention
from jax_it.sharding import mesh_size, parts_of

# How many of a row's queries have their scores in memory at once, as the number of scores grows with the square of the
# length. Longer rows are computed in chunks, which the backward pass computes again.
MAX_QUERIES = 1024
# Up to 8192 positions a causal row is cut into at most 8 blocks of at least 128 queries, each with the keys up to its
# last query: with 8 blocks 9/16 of the scores are computed. Smaller blocks cost more in operations than they save in
# scores. Longer rows have blocks of MAX_QUERIES.
MIN_BLOCK, MAX_BLOCKS = 128, 8


def attend(
    query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, scores: Scores, mask: Mask,
    options: ComputeOptions, *, bias: jax.Array | DistanceBias | None = None, dropout_key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attend from queries to keys, and return [B, T, N, H]. With a window, both have the same positions.

    `bias`, [N, T, S] or [B, N, T, S], or by distance as kernels take it, is added to the scores. Dropout needs a
    `dropout_key`. Where a kernel computes the rows, which takes a mask made of segments, what padding attends to is not
    defined. Of `options`, `fused_attention` and `recompute` are read.
    """
    length, heads, head_dim = query_BTNH.shape[1:]
    mask_BTS, causal, window = mask.allowed_BTS, mask.causal, mask.window
    if options.fused_attention and mask.segments:
        arrays, interpret = (query_BTNH, key_BSKH, value_BSKH), options.fused_attention == "interpret"
        # Where it can, splash computes causal rows of any length, whose keys it reads block by block.
        splash = causal and bias is None and not (scores.dropout and dropout_key is not None)
        if splash and splash_attention.fits(length, heads, key_BSKH.shape[2], head_dim):
            return splash_attention.attend(
                *arrays,
                mask.segments[0],
                window=window,
                scale=scores.scale,
                softcap=scores.softcap,
                interpret=interpret,
            )
        from jax_it.models import flash_attention  # slow to import, and for TPUs alone

        assert bias is None or isinstance(bias, DistanceBias)
        if flash_attention.fits(query_BTNH, key_BSKH, bias=bias is not None, causal=causal):
            return flash_attention.attend(
                *arrays, scores, *mask.segments, causal=causal, window=window, bias=bias, dropout_key=dropout_key,
                interpret=interpret,
            )  # fmt: skip
    if isinstance(bias, DistanceBias):
        bias = bias.square()
    if window:
        distance_TS = jnp.arange(length)[:, None] - jnp.arange(length)
        mask_BTS = mask_BTS & (jnp.abs(distance_TS) < window)
    keys_values = by_head(key_BSKH, value_BSKH)
    # A loop over rows that lie on several devices would move them around.
    row_by_row = options.recompute and mesh_size() == 1 and (bias is None or bias.ndim == 3)
    compute = partial(row_attention if row_by_row else plain_attention, scores=scores)
    if causal and parts_of("T") == 1 and length > MIN_BLOCK:
        return _attend_causal_blocks(compute, query_BTNH, *keys_values, mask_BTS, bias, dropout_key)
    if length > MAX_QUERIES * parts_of("T"):
        return _attend_in_chunks(compute, query_BTNH, *keys_values, mask_BTS, bias, dropout_key)
    return compute(query_BTNH, *keys_values, mask_BTS=mask_BTS, bias=bias, dropout_key=dropout_key)


def _attend_causal_blocks(
    compute: Callable, query_BTNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, mask_BTS: jax.Array,
    bias: jax.Array | None, dropout_key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Attend block by block of queries, each to the keys up to its last query."""
    length = query_BTNH.shape[1]
    size = min(max(MIN_BLOCK, -(-length // MAX_BLOCKS)), MAX_QUERIES)
    starts = range(0, length, size)
    checkpoint = jax.checkpoint if length > MAX_QUERIES else (lambda block: block)
    block = checkpoint(compute)
    attended = []
    for start, block_key in zip(starts, split_key(dropout_key, len(starts)), strict=True):
        end = min(start + size, length)
        attended_BTNH = block(
            query_BTNH[:, start:end], key_BKHS[..., :end], value_BKSH[:, :, :end],
            mask_BTS=mask_BTS[:, start:end, :end], bias=None if bias is None else bias[..., start:end, :end],
            dropout_key=block_key,
        )  # fmt: skip
        attended.append(attended_BTNH)
    return jnp.concatenate(attended, axis=1)


def _attend_in_chunks(
    compute: Callable, query_BTNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, mask_BTS: jax.Array,
    bias: jax.Array | None, dropout_key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Attend chunk by chunk of queries. A chunk has every n-th query, so that all devices have a share of it."""
    rows, length, heads, _ = query_BTNH.shape
    chunks = -(-length // (MAX_QUERIES * parts_of("T")))

    def split(x: jax.Array | None, axis: int) -> jax.Array | None:
        """Cut `x` along T, chunks first."""
        if x is None:
            return None
        axis %= x.ndim
        padded = jnp.pad(x, [(0, -length % chunks if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, chunks, *x.shape[axis + 1 :]), axis + 1, 0)

    xs = (
        split(query_BTNH, 1),
        split(jnp.broadcast_to(mask_BTS, (rows, *mask_BTS.shape[1:])), 1),
        split(bias, -2),
        None if dropout_key is None else jax.random.split(dropout_key, chunks),
    )
    chunk = jax.checkpoint(compute)

    def step(_: None, x: tuple) -> tuple[None, jax.Array]:
        query_BTNH, mask_BTS, bias, chunk_key = x
        return None, chunk(
            query_BTNH, key_BKHS, value_BKSH, mask_BTS=mask_BTS, bias=bias, dropout_key=chunk_key
        )  # fmt: skip

    _, attended = jax.lax.scan(step, None, xs)
    return jnp.moveaxis(attended, 0, 2).reshape(rows, -1, heads, attended.shape[-1])[:, :length]
