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
FEWEST = 128  # queries of a causal row that go together, each with the keys that the last of them sees
PARTS = 8  # of such a row, up to QUERIES x PARTS positions: a ninth of what is computed is then masked
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


def apart(stacked: nnx.Module) -> nnx.List:
    """The stacked layers, each by itself: a scan copies a layer's weights every time it comes to it."""
    graph, state = nnx.split(stacked)
    each = (jax.tree.map(lambda whole, i=i: whole[i], state) for i in range(_number(state)))
    return nnx.List([nnx.merge(graph, weights) for weights in each])


def _number(state: Any) -> int:
    """Of the layers that stacked weights are for."""
    return len(jax.tree.leaves(state)[0])


def in_order(layers: nnx.Module, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """The last carry = body(carry, i, layer) of all layers in turn: by a scan, or one by one if they are apart."""
    if isinstance(layers, nnx.List):
        for i, layer in enumerate(layers):
            carry = body(carry, i, layer)
        return carry
    graph, state = nnx.split(layers)

    def step(carry: Any, xs: tuple) -> tuple[Any, None]:
        return body(carry, xs[0], nnx.merge(graph, xs[1])), None

    return jax.lax.scan(step, carry, (jnp.arange(_number(state)), state))[0]


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
    causal: bool = False,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    cap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attention, shape [B, T, N, H]; N // K heads of queries share each head of keys. Scores and softmax are float32.

    Scores are multiplied by `scale`, squashed to (-cap, cap) where a cap is given (Gemma 2), and `bias` is added
    to them, [N, T, S] or [B, N, T, S]. Where the mask is `causal`, the keys after some queries are not read at all.
    Long rows are computed some queries at a time, and again in the backward pass: of the scores, whose number grows
    with the square of the length, a device has `QUERIES` rows at once.
    """
    rows, length, heads, _ = query_BTNH.shape
    key_BKHS, value_BKSH = by_head(key_BSKH, value_BSKH)
    part: Any = partial(_attend, scale=scale, cap=cap, dropout_rate=dropout_rate)
    chunks = -(-length // (QUERIES * parts_of("T")))
    if causal and parts_of("T") == 1 and length > FEWEST:
        size = min(max(FEWEST, -(-length // PARTS)), QUERIES)
        starts = range(0, length, size)
        part = jax.checkpoint(part) if chunks > 1 else part
        attended = []
        for start, key in zip(starts, split_key(dropout_key, len(starts)), strict=True):
            end = min(start + size, length)
            near = None if bias is None else bias[..., start:end, :end]
            mask = mask_BTS[:, start:end, :end]
            seen = key_BKHS[..., :end], value_BKSH[:, :, :end]
            attended.append(part(*seen, query_BTNH[:, start:end], mask, near, key))
        return jnp.concatenate(attended, axis=1)
    if chunks == 1:
        return part(key_BKHS, value_BKSH, query_BTNH, mask_BTS, bias, dropout_key)

    def split(x: jax.Array | None, axis: int) -> jax.Array | None:
        """`x` cut along T, chunks first. A chunk has every n-th position, so that all devices have a share of it."""
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
    again = partial(jax.checkpoint(part), key_BKHS, value_BKSH)
    _, attended_chunks = jax.lax.scan(lambda _, x: (None, again(*x)), None, xs)
    return jnp.moveaxis(attended_chunks, 0, 2).reshape(rows, -1, heads, attended_chunks.shape[-1])[:, :length]


def attend_cached(
    query_BTNH: jax.Array,
    key_BKHS: jax.Array,
    value_BKSH: jax.Array,
    *,
    mask_BTS: jax.Array,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    cap: float = 0.0,
) -> jax.Array:
    """The same to the keys and values of a cache, all at once and without dropout: [B, T, N, H]."""
    return _attend(key_BKHS, value_BKSH, query_BTNH, mask_BTS, bias, None, scale=scale, cap=cap)


def by_head(key_BSKH: jax.Array, value_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values in the order in which they are multiplied and cached, each head's together."""
    return jnp.moveaxis(key_BSKH, 1, -1), jnp.swapaxes(value_BSKH, 1, 2)


def keys_of_all(x_BSKH: jax.Array, rows: int) -> jax.Array:
    """Keys or values, made where their positions lie, on every device that has some of a row's queries.

    A source of G blocks comes as G rows of its own, and goes as one of G times the length.
    """
    x_BSKH = constrain(constrain(x_BSKH, "B T K H"), "B S K H")
    return x_BSKH.reshape(rows, -1, *x_BSKH.shape[2:])


def _attend(
    key_BKHS: jax.Array, value_BKSH: jax.Array, query_BTNH: jax.Array, mask_BTS: jax.Array, bias: jax.Array | None,
    key: jax.Array | None, *, scale: float, cap: float, dropout_rate: float = 0.0,
) -> jax.Array:  # fmt: skip
    rows, length, heads, size = query_BTNH.shape
    key_heads = key_BKHS.shape[1]
    # M: the heads of queries that share a head of keys. The products' axes come as they are multiplied, rows of memory
    # last, and between the two there are four: anything else takes a CPU up to four times as long.
    query_BKMTH = jnp.swapaxes(query_BTNH, 1, 2).reshape(rows, key_heads, heads // key_heads, length, size)
    scores_BKMTS = jnp.einsum("BKMTH,BKHS->BKMTS", query_BKMTH, key_BKHS, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BKMTS.reshape(rows, heads, length, -1)
    if scale != 1:
        scores_BNTS *= scale
    if cap:
        scores_BNTS = cap * jnp.tanh(scores_BNTS / cap)
    if bias is not None:
        scores_BNTS += bias
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, MASKED)
    powers_BNTS = jnp.exp(scores_BNTS - jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True)))
    # The softmax's sum divides what is attended: H numbers in place of S.
    sum_BNT1 = powers_BNTS.sum(-1, keepdims=True)
    powers_BNTS = dropout(powers_BNTS, dropout_rate, key).astype(value_BKSH.dtype)
    powers_BKMTS = powers_BNTS.reshape(scores_BKMTS.shape)
    attended_BKMTH = jnp.einsum("BKMTS,BKSH->BKMTH", powers_BKMTS, value_BKSH, preferred_element_type=jnp.float32)
    attended_BNTH = attended_BKMTH.reshape(rows, heads, length, -1) / sum_BNT1
    return jnp.swapaxes(attended_BNTH, 1, 2).astype(value_BKSH.dtype)
