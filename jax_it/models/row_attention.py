"""Attention with a gradient of its own, for CPUs: row by row, and no score is kept for the backward pass.

A row's scores fit into the processor's caches, and reading them back from memory takes longer than computing them
again. As in FlashAttention (Dao et al. 2022, section 3.1), what is kept of the softmax is its maximum and its sum, and
what its gradient sums over keys, ds = p * (dp - sum of p * dp), is the product of the result and the result's gradient.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_it.models.attention import Scores
from jax_it.models.dropout import keep, random_bits


def row_attention(
    query_BTNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, scores: Scores, mask_BTS: jax.Array,
    bias: jax.Array | None = None, dropout_key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Compute what `plain_attention` does, with a `bias` [N, T, S]."""
    rows, length, heads, head_dim = query_BTNH.shape
    kv_heads, keys = key_BKHS.shape[1], key_BKHS.shape[-1]
    bits_BNTS = random_bits((rows, heads, length, keys), scores.dropout, dropout_key)
    # J: a head's query positions, of all the heads (M) that share a head of keys.
    query_BKJH = jnp.swapaxes(query_BTNH, 1, 2).reshape(rows, kv_heads, -1, head_dim)
    mask_BTS = jnp.broadcast_to(mask_BTS, (rows, length, keys))
    attended_BKJH = _attend(scores, query_BKJH, key_BKHS, value_BKSH, bias, mask_BTS, bits_BNTS)
    return jnp.swapaxes(attended_BKJH.reshape(rows, heads, length, head_dim), 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores: Scores, *arrays: Any) -> jax.Array:
    return _forward(scores, *arrays)[0]


def _forward(
    scores: Scores, query_BKJH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, bias_NTS: jax.Array | None,
    mask_BTS: jax.Array, bits_BNTS: jax.Array | None,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    def row(arrays: tuple) -> tuple[jax.Array, ...]:
        query_KJH, key_KHS, value_KSH, mask_TS, bits_NTS = arrays
        scores_NTS = scores.of(_products(query_KJH, key_KHS, mask_TS), bias_NTS, mask_TS)
        max_NT1 = scores_NTS.max(-1, keepdims=True)
        powers_NTS = _materialize(jnp.exp(scores_NTS - max_NT1))
        sum_NT1 = powers_NTS.sum(-1, keepdims=True)
        powers_NTS = keep(powers_NTS, scores.dropout, bits_NTS).astype(value_KSH.dtype)
        powers_KJS = _materialize(powers_NTS).reshape(*query_KJH.shape[:2], -1)
        attended_KJH = jnp.einsum("KJS,KSH->KJH", powers_KJS, value_KSH, preferred_element_type=sum_NT1.dtype)
        attended_KJH /= sum_NT1.reshape(*attended_KJH.shape[:2], 1)
        return attended_KJH.astype(value_KSH.dtype), max_NT1, sum_NT1

    attended_BKJH, *softmax = jax.lax.map(row, (query_BKJH, key_BKHS, value_BKSH, mask_BTS, bits_BNTS))
    return attended_BKJH, (query_BKJH, key_BKHS, value_BKSH, bias_NTS, mask_BTS, bits_BNTS, attended_BKJH, *softmax)


def _backward(scores: Scores, kept: tuple, gradient_BKJH: jax.Array) -> tuple:
    query_BKJH, key_BKHS, value_BKSH, bias_NTS, *rest = kept
    # Products are written such that what is summed over comes last on the left and second to last on the right, or
    # second to last in both: the forms that a CPU computes at its full rate. So some operands are turned first.
    turned = [jnp.swapaxes(key_BKHS, 2, 3), jnp.swapaxes(value_BKSH, 2, 3)]

    def row(bias_gradient_NTS: Any, arrays: tuple) -> tuple[Any, tuple]:
        query_KJH, key_KHS, key_KSH, value_KHS, gradient_KJH, mask_TS, bits_NTS, attended_KJH, max_NT1, sum_NT1 = arrays
        dtype = query_KJH.dtype
        scores_NTS, back = jax.vjp(
            lambda products_NTS: scores.of(products_NTS, bias_NTS, mask_TS), _products(query_KJH, key_KHS, mask_TS)
        )
        weights_NTS = jnp.exp(scores_NTS - max_NT1) / sum_NT1
        for_weights_NTS = keep(_products(gradient_KJH, value_KHS, mask_TS), scores.dropout, bits_NTS)
        shares = gradient_KJH.astype(sum_NT1.dtype) * attended_KJH.astype(sum_NT1.dtype)
        for_scores_NTS = weights_NTS * (for_weights_NTS - shares.sum(-1).reshape(sum_NT1.shape))
        (for_products_NTS,) = back(for_scores_NTS)
        dropped_NTS = keep(weights_NTS, scores.dropout, bits_NTS).astype(dtype)
        if bias_NTS is not None:
            bias_gradient_NTS += jnp.where(mask_TS, for_scores_NTS, 0)
        dropped_KJS, for_products_KJS = (
            x.reshape(*query_KJH.shape[:2], -1) for x in _materialize((dropped_NTS, for_products_NTS.astype(dtype)))
        )
        for_value_KHS = jnp.einsum("KJH,KJS->KHS", gradient_KJH, dropped_KJS)
        for_key_KHS = jnp.einsum("KJH,KJS->KHS", query_KJH, for_products_KJS)
        for_query_KJH = jnp.einsum("KJS,KSH->KJH", for_products_KJS, key_KSH)
        return bias_gradient_NTS, (for_query_KJH, for_key_KHS, for_value_KHS)

    start = None if bias_NTS is None else jnp.zeros_like(bias_NTS)
    xs = _materialize((query_BKJH, key_BKHS, *turned, gradient_BKJH, *rest))
    bias_gradient_NTS, (for_query, for_key, for_value_BKHS) = jax.lax.scan(row, start, xs)
    return for_query, for_key, jnp.swapaxes(for_value_BKHS, 2, 3), bias_gradient_NTS, None, None


_attend.defvjp(_forward, _backward)


def _products(left_KJH: jax.Array, right_KHS: jax.Array, mask_TS: jax.Array) -> jax.Array:
    """Return the products [N, T, S], float32 or wider."""
    wide = jnp.promote_types(left_KJH.dtype, jnp.float32)
    products_KJS = jnp.einsum("KJH,KHS->KJS", left_KJH, right_KHS, preferred_element_type=wide)
    return _materialize(products_KJS.reshape(-1, *mask_TS.shape))


def _materialize(x: Any) -> Any:
    """Keep XLA from computing elementwise work again within each of several loops that read its result."""
    return jax.lax.optimization_barrier(x)
