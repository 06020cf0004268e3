"""Parts that the model families share, and the letters that name every axis.

    B batch        T target or query position   S source or key position   D model
    N heads        K key-value heads            H head size                F feed-forward
    V vocabulary   L layers                     E relative-position buckets
    R adapter rank X experts                    G source blocks of a row

A packed row's source is G blocks of S positions each, and no example crosses a block's border, so
self-attention in the encoder costs no more than in padded batches.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

MASKED = -1e30  # a score's value where attention is not allowed; finite, so that a row of them is no NaN

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """A float32 weight drawn from a normal distribution."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules as one, whose weights have a leading axis L."""
    keys = jax.random.split(rngs.params(), layers)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; `x` itself where there is no key. The rate is rounded to a multiple of 1/256.

    Four elements share one random word: random numbers are most of dropout's cost.
    """
    dropped = round(rate * 256)
    if key is None or not dropped:
        return x
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32)
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return jnp.where(octets >= dropped, x * jnp.asarray(256 / (256 - dropped), x.dtype), 0)


def split_key(key: jax.Array | None, number: int) -> list[jax.Array | None]:
    return [None] * number if key is None else list(jax.random.split(key, number))


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """`x` over its root mean square along the last axis, computed in float32, in `x`'s dtype."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + epsilon)
    return (x32 * scale_D.astype(jnp.float32)).astype(x.dtype)


def relative_buckets(distance: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """T5's bucket of each distance (key position minus query position): exact when near, log-spaced when far."""
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


def toeplitz_distances(length: int) -> jax.Array:
    """The distances, key minus query, whose values `toeplitz` takes: 0 … length - 1, then -length … -1."""
    return (jnp.arange(2 * length) + length) % (2 * length) - length


def toeplitz(values_NW: jax.Array, length: int) -> jax.Array:
    """The matrices [N, T, S] with `values[n, (s - t) % W]` at (t, s), W being twice the length.

    Made of copies and cuts, because the gradient of a gather of [T, S] indices is a slow scatter.
    """
    width = 2 * length
    rows = jnp.broadcast_to(values_NW[:, None], (values_NW.shape[0], length, width))
    shifted = rows.reshape(-1, length * width)[:, : length * (width - 1)].reshape(-1, length, width - 1)
    return shifted[:, :, :length]


def attend(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    *,
    mask_BTS: jax.Array,
    bias: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attention without scaling, as T5's, shape [B, T, N, H]. Scores and softmax are float32.

    `bias` is added to the scores, [N, T, S] or [B, N, T, S].
    """
    scores = jnp.einsum("BTNH,BSNH->BNTS", query_BTNH, key_BSNH, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias
    scores = jnp.where(mask_BTS[:, None], scores, MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, dropout_key)
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(value_BSNH.dtype), value_BSNH)
