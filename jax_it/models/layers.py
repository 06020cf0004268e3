"""Parts that the model families share, and the letters that name every axis.

    B batch        T target or query position   S source or key position   D model
    N heads        K key-value heads            H head size                F feed-forward
    V vocabulary   L layers                     E relative-position buckets
    R adapter rank X experts                    G source blocks of a row
    P learned positions

A packed row's source is G blocks of S positions each, and no example crosses a block's border, so
self-attention in the encoder costs no more than in padded batches.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models.linear import dropout
from jax_it.sharding import constrain, parts_of

QUERIES = 1024  # of a row, whose scores exist at a time
MASKED = -1e30  # a score's value where attention is not allowed; finite, so that a row of them is no NaN

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


NormKind = Literal["rms", "rms_plus_one", "layer"]


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """A float32 weight drawn from a normal distribution."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules as one, whose weights have a leading axis L."""
    keys = jax.random.split(rngs.params(), layers)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def in_order(stacked: nnx.Module, number: int, unrolled: bool) -> Callable[[Callable[[Any, Any, Any], Any], Any], Any]:
    """`go(body, carry)`, which gives carry = body(carry, i, module) for each of the stacked layers and returns it.

    By a scan; or, `unrolled`, one after the other: a scan copies a layer's weights, and what is read of a cache, every
    time it comes to it. Their weights are then cut apart here, to be done once outside of a loop over steps.
    """
    graph, state = nnx.split(stacked)
    if unrolled:
        states = [jax.tree.map(lambda whole, i=i: whole[i], state) for i in range(number)]

        def one_by_one(body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
            for i, state in enumerate(states):
                carry = body(carry, i, nnx.merge(graph, state))
            return carry

        return one_by_one

    def scan(body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        def step(carry: Any, xs: tuple) -> tuple[Any, None]:
            return body(carry, xs[0], nnx.merge(graph, xs[1])), None

        return jax.lax.scan(step, carry, (jnp.arange(number), state))[0]

    return scan


def split_key(key: jax.Array | None, number: int) -> list[jax.Array | None]:
    return [None] * number if key is None else list(jax.random.split(key, number))


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """`x` over its root mean square along the last axis, computed in float32, in `x`'s dtype."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + epsilon)
    return (x32 * scale_D.astype(jnp.float32)).astype(x.dtype)


class Norm(nnx.Module):
    """A norm over the last axes, computed in float32: "rms", Gemma's "rms_plus_one" (scaled by 1 + w), or "layer"."""

    def __init__(self, kind: NormKind, shape: tuple[int, ...], epsilon: float):
        self.kind, self.epsilon = kind, epsilon
        self.scale = nnx.Param(jnp.zeros(shape) if kind == "rms_plus_one" else jnp.ones(shape))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...].astype(jnp.float32)
        axes = tuple(range(-scale.ndim, 0))
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 -= x32.mean(axes, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.square(x32).mean(axes, keepdims=True) + self.epsilon)
        x32 *= 1 + scale if self.kind == "rms_plus_one" else scale
        if self.kind == "layer":
            x32 += self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)


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
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    mask_BTS: jax.Array,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    cap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    layout: Literal["BSKH", "BKSH"] = "BSKH",
) -> jax.Array:
    """Attention, shape [B, T, N, H]; N // K heads of queries share each head of keys. Scores and softmax are float32.

    The axes of keys and values are those of `layout`: the second is that of caches.

    Scores are multiplied by `scale`, squashed to (-cap, cap) where a cap is given (Gemma 2), and `bias` is added
    to them, [N, T, S] or [B, N, T, S]. Long rows are computed some queries at a time, and again in the backward
    pass: of the scores, whose number grows with the square of the length, a device has `QUERIES` rows at once.
    """
    rows, length, heads, _ = query_BTNH.shape
    part = partial(_attend, layout, key_BSKH, value_BSKH, scale=scale, cap=cap, dropout_rate=dropout_rate)
    chunks = -(-length // (QUERIES * parts_of("T")))
    if chunks == 1:
        return part(query_BTNH, mask_BTS, bias, dropout_key)

    def split(x: jax.Array | None, axis: int) -> jax.Array | None:
        """`x` cut along T, chunks first. A chunk has every n-th position, so that all devices have a share of it."""
        if x is None:
            return None
        axis %= x.ndim
        padded = jnp.pad(x, [(0, -length % chunks if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, chunks, *x.shape[axis + 1 :]), axis + 1, 0)

    keys = None if dropout_key is None else jax.random.split(dropout_key, chunks)
    xs = (
        split(query_BTNH, 1),
        split(jnp.broadcast_to(mask_BTS, (rows, *mask_BTS.shape[1:])), 1),
        split(bias, -2),
        keys,
    )
    _, attended = jax.lax.scan(lambda _, x: (None, jax.checkpoint(part)(*x)), None, xs)
    return jnp.moveaxis(attended, 0, 2).reshape(rows, -1, heads, attended.shape[-1])[:, :length]


def keys_of_all(x_BSKH: jax.Array, rows: int) -> jax.Array:
    """Keys or values, made where their positions lie, on every device that has some of a row's queries.

    A source of G blocks comes as G rows of its own, and goes as one of G times the length.
    """
    x_BSKH = constrain(constrain(x_BSKH, "B T K H"), "B S K H")
    return x_BSKH.reshape(rows, -1, *x_BSKH.shape[2:])


def _attend(
    layout: str, key_BSKH: jax.Array, value_BSKH: jax.Array, query_BTNH: jax.Array, mask_BTS: jax.Array,
    bias: jax.Array | None, key: jax.Array | None, *, scale: float, cap: float, dropout_rate: float,
) -> jax.Array:  # fmt: skip
    rows, length, heads, size = query_BTNH.shape
    key_heads = key_BSKH.shape[layout.index("K")]
    # M: the heads of queries that share a head of keys
    query_BTKMH = query_BTNH.reshape(rows, length, key_heads, heads // key_heads, size)
    if layout == "BKSH":
        # Few queries, Q of a head of keys, and many keys: with the keys first a CPU is four times as fast at this
        # product (3 queries, 544 keys), and the barrier keeps the compiler from turning it round again.
        query_BKQH = jnp.moveaxis(query_BTKMH, 1, 3).reshape(rows, key_heads, -1, size)
        scores_BKSQ = jnp.einsum("BKSH,BKQH->BKSQ", key_BSKH, query_BKQH, preferred_element_type=jnp.float32)
        scores_BKQS = jnp.swapaxes(jax.lax.optimization_barrier(scores_BKSQ), 2, 3)
        scores = scores_BKQS.reshape(rows, key_heads, heads // key_heads, length, -1)
    else:
        scores = jnp.einsum("BTKMH,BSKH->BKMTS", query_BTKMH, key_BSKH, preferred_element_type=jnp.float32)
    if scale != 1:
        scores *= scale
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores += bias.reshape(*bias.shape[:-3], key_heads, heads // key_heads, *bias.shape[-2:])
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key)
    weights = weights.astype(value_BSKH.dtype)
    if layout == "BKSH":
        weights_BKQS = weights.reshape(rows, key_heads, -1, weights.shape[-1])
        attended_BKQH = jnp.einsum("BKQS,BKSH->BKQH", jax.lax.optimization_barrier(weights_BKQS), value_BSKH)
        attended = jnp.moveaxis(attended_BKQH.reshape(*scores.shape[:-1], size), 3, 1)
    else:
        attended = jnp.einsum("BKMTS,BSKH->BTKMH", weights, value_BSKH)
    return attended.reshape(rows, length, heads, size)
