"""The norms of the model families."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

NormKind = Literal["rms", "rms_plus_one", "layer"]


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
