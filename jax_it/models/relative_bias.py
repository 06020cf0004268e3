"""T5's relative-position bias (Raffel et al. 2020, section 2.1): a number per head and bucket of distances."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class DistanceBias(NamedTuple):
    """A float32 number per head and distance of a square of scores: 0 … length - 1, and then -length … -1."""

    values_NZ: jax.Array

    def square(self) -> jax.Array:
        """Return the bias [N, T, S]: `values[n, (s - t) % Z]` at (t, s), Z being twice the length.

        Made by copying and slicing, because the gradient of a gather of [T, S] indices is a slow scatter.
        """
        heads, width = self.values_NZ.shape
        length = width // 2
        rows = jnp.broadcast_to(self.values_NZ[:, None], (heads, length, width))
        shifted = rows.reshape(-1, length * width)[:, : length * (width - 1)].reshape(-1, length, width - 1)
        return shifted[:, :, :length]


@dataclass(frozen=True)
class RelativeBias:
    """How attention scores depend on distance. Distances are key position minus query position."""

    buckets: int  # E
    max_distance: int
    bidirectional: bool
    per_layer: bool  # each layer has its own table, not the whole stack one

    def bucket(self, distance: jax.Array) -> jax.Array:
        """Return each distance's bucket: exact when near, log-spaced when far."""
        buckets, offset = self.buckets, jnp.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset = jnp.where(distance > 0, buckets, 0)
            distance = jnp.abs(distance)
        else:
            distance = jnp.maximum(-distance, 0)
        exact = buckets // 2
        ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
        return offset + jnp.where(distance < exact, distance, far)

    def by_distance(self, table_EN: jax.Array, length: int) -> DistanceBias:
        """Return the bias of `length` query and key positions."""
        width = 2 * length
        # Every distance of the square once: 0 … length - 1, then -length … -1.
        distance_Z = (jnp.arange(width) + length) % width - length
        chosen_ZE = jax.nn.one_hot(self.bucket(distance_Z), self.buckets)
        values_ZN = jnp.matmul(chosen_ZE, table_EN, precision=jax.lax.Precision.HIGHEST)  # picks, and must not round
        return DistanceBias(values_ZN.T)

    def square(self, table_EN: jax.Array, length: int) -> jax.Array:
        """Return the float32 bias [N, T, S] of `length` query and key positions."""
        return self.by_distance(table_EN, length).square()

    def rows(self, table_EN: jax.Array, distance_BS: jax.Array) -> jax.Array:
        """Return the bias [B, N, 1, S] of one query a row, whose distances from the keys are given."""
        return jnp.moveaxis(table_EN[self.bucket(distance_BS)], -1, 1)[:, :, None]
