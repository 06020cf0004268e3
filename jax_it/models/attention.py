"""Attention: one call, `attend`, over implementations that are chosen by shape and platform.

All of them take scores and softmax in float32, and N // K heads of queries share each head of keys.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_it.models import splash_attention
from jax_it.models.linear import dropout, split_key
from jax_it.sharding import constrain, parts_of

MASKED = -1e30  # the score of a pair that is not allowed; finite, so that a row of them does not become NaN

# How many of a row's queries have their scores in memory at once, as the number of scores grows with the square of the
# length. Longer rows are computed in chunks, which the backward pass computes again.
MAX_QUERIES = 1024
# Up to 8192 positions a causal row is cut into at most 8 blocks of at least 128 queries, each with the keys up to its
# last query: with 8 blocks 9/16 of the scores are computed. Smaller blocks cost more in operations than they save in
# scores. Longer rows have blocks of MAX_QUERIES.
MIN_BLOCK, MAX_BLOCKS = 128, 8


class Scores(NamedTuple):
    """How scores are made of products of queries and keys."""

    scale: float = 1.0
    softcap: float = 0.0  # Gemma 2: squashed into (-softcap, softcap); 0: not
    dropout: float = 0.0  # the rate of the weights, if a key is given


def attend(
    query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, scores: Scores, *,
    mask_BTS: jax.Array, segments_BT: jax.Array | None = None, causal: bool = False, window: int = 0,
    fused: splash_attention.Fused = False, bias: jax.Array | None = None, key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attend from queries to keys; returns [B, T, N, H].

    `mask_BTS` says which pairs are allowed; with a `window`, T = S and only keys less than `window` positions away are,
    before the query or after it.
    `causal`: the mask allows no key after its query, so those are not read. `bias`, [N, T, S] or [B, N, T, S], is added
    to the scores. `key` is for dropout.
    """
    length, heads, head_dim = query_BTNH.shape[1:]
    if (
        fused and causal and bias is None and segments_BT is not None and not (scores.dropout and key is not None)
        and splash_attention.fits(length, heads, key_BSKH.shape[2], head_dim)
    ):  # fmt: skip
        return splash_attention.attend(
            query_BTNH, key_BSKH, value_BSKH, segments_BT, window=window, scale=scores.scale, softcap=scores.softcap,
            interpret=fused == "interpret",
        )  # fmt: skip
    if window:
        distance_TS = jnp.arange(length)[:, None] - jnp.arange(length)
        mask_BTS = mask_BTS & (jnp.abs(distance_TS) < window)
    keys_values = by_head(key_BSKH, value_BSKH)
    if causal and parts_of("T") == 1 and length > MIN_BLOCK:
        return _attend_causal_blocks(query_BTNH, *keys_values, scores, mask_BTS, bias, key)
    if length > MAX_QUERIES * parts_of("T"):
        return _attend_in_chunks(query_BTNH, *keys_values, scores, mask_BTS, bias, key)
    return attend_by_head(query_BTNH, *keys_values, scores, mask_BTS, bias, key)


def attend_by_head(
    query_BTNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, scores: Scores, mask_BTS: jax.Array,
    bias: jax.Array | None = None, key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attend in plain JAX, all scores at once, to keys and values in the order of a cache."""
    rows, length, heads, head_dim = query_BTNH.shape
    kv_heads = key_BKHS.shape[1]
    # M: the heads of queries that share a head of keys. The products' axes come as they are multiplied, rows of memory
    # last, and between the two there are four: anything else takes a CPU up to four times as long.
    query_BKMTH = jnp.swapaxes(query_BTNH, 1, 2).reshape(rows, kv_heads, heads // kv_heads, length, head_dim)
    scores_BKMTS = jnp.einsum("BKMTH,BKHS->BKMTS", query_BKMTH, key_BKHS, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BKMTS.reshape(rows, heads, length, -1)
    if scores.scale != 1:
        scores_BNTS *= scores.scale
    if scores.softcap:
        scores_BNTS = scores.softcap * jnp.tanh(scores_BNTS / scores.softcap)
    if bias is not None:
        scores_BNTS += bias
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, MASKED)
    powers_BNTS = jnp.exp(scores_BNTS - jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True)))
    # The softmax's sum divides the result: H numbers in place of S.
    sum_BNT1 = powers_BNTS.sum(-1, keepdims=True)
    powers_BNTS = dropout(powers_BNTS, scores.dropout, key).astype(value_BKSH.dtype)
    powers_BKMTS = powers_BNTS.reshape(scores_BKMTS.shape)
    attended_BKMTH = jnp.einsum("BKMTS,BKSH->BKMTH", powers_BKMTS, value_BKSH, preferred_element_type=jnp.float32)
    attended_BNTH = attended_BKMTH.reshape(rows, heads, length, -1) / sum_BNT1
    return jnp.swapaxes(attended_BNTH, 1, 2).astype(value_BKSH.dtype)


def _attend_causal_blocks(
    query_BTNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, scores: Scores, mask_BTS: jax.Array,
    bias: jax.Array | None, key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Attend block by block of queries, each to the keys up to its last query."""
    length = query_BTNH.shape[1]
    size = min(max(MIN_BLOCK, -(-length // MAX_BLOCKS)), MAX_QUERIES)
    starts = range(0, length, size)
    block = _with_scores(scores)
    block = jax.checkpoint(block) if length > MAX_QUERIES else block
    attended = []
    for start, block_key in zip(starts, split_key(key, len(starts)), strict=True):
        end = min(start + size, length)
        near = None if bias is None else bias[..., start:end, :end]
        seen = key_BKHS[..., :end], value_BKSH[:, :, :end]
        attended.append(block(*seen, query_BTNH[:, start:end], mask_BTS[:, start:end, :end], near, block_key))
    return jnp.concatenate(attended, axis=1)


def _attend_in_chunks(
    query_BTNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, scores: Scores, mask_BTS: jax.Array,
    bias: jax.Array | None, key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Attend chunk by chunk of queries. A chunk has every n-th query, so that all devices have a share of it."""
    rows, length, heads, _ = query_BTNH.shape
    chunks = -(-length // (MAX_QUERIES * parts_of("T")))

    def split(x: jax.Array | None, axis: int) -> jax.Array | None:
        """`x` cut along T, chunks first."""
        if x is None:
            return None
        axis %= x.ndim
        padded = jnp.pad(x, [(0, -length % chunks if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, chunks, *x.shape[axis + 1 :]), axis + 1, 0)

    xs = (
        split(query_BTNH, 1),
        split(jnp.broadcast_to(mask_BTS, (rows, *mask_BTS.shape[1:])), 1),
        split(bias, -2),
        None if key is None else jax.random.split(key, chunks),
    )
    chunk = partial(jax.checkpoint(_with_scores(scores)), key_BKHS, value_BKSH)
    _, attended = jax.lax.scan(lambda _, x: (None, chunk(*x)), None, xs)
    return jnp.moveaxis(attended, 0, 2).reshape(rows, -1, heads, attended.shape[-1])[:, :length]


def _with_scores(scores: Scores) -> Callable[..., jax.Array]:
    """`attend_by_head` for `jax.checkpoint`, whose arguments are arrays: keys, values, queries, mask, bias, key."""
    return lambda key, value, query, *rest: attend_by_head(query, key, value, scores, *rest)


def causal_mask(segments_BT: jax.Array, prefix_BT: jax.Array | None = None) -> jax.Array:
    """Return where position t may see s, [B, T, S]: in its segment, not after it, or both in the segment's prefix."""
    length = segments_BT.shape[1]
    seen_BTS = jnp.tri(length, dtype=bool)[None]
    if prefix_BT is not None:
        seen_BTS = seen_BTS | ((prefix_BT[:, :, None] > 0) & (prefix_BT[:, None] > 0))
    return seen_BTS & (segments_BT[:, :, None] == segments_BT[:, None])


def by_head(key_BSKH: jax.Array, value_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys [B, K, H, S] and values [B, K, S, H]: the order in which they are multiplied and cached."""
    return jnp.moveaxis(key_BSKH, 1, -1), jnp.swapaxes(value_BSKH, 1, 2)


def gather_kv(x_BSKH: jax.Array, rows: int) -> jax.Array:
    """Bring keys or values, computed where their positions lie, to every device that has some of a row's queries.

    A source of G blocks comes as G rows of its own, and is returned as one of G times the length.
    """
    x_BSKH = constrain(constrain(x_BSKH, "B T K H"), "B S K H")
    return x_BSKH.reshape(rows, -1, *x_BSKH.shape[2:])
