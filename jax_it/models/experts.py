"""Mixtures of experts: each token goes to the few experts that its router scores highest (Shazeer et al. 2017)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jax_it import sharding
from jax_it.models.linear import ACTIVATIONS, dense, normal
from jax_it.models.quantized import Quantized
from jax_it.sharding import constrain

Activation = Callable[[jax.Array], jax.Array]


class Experts(NamedTuple):
    """The experts of a layer."""

    number: int  # X
    per_token: int
    mlp_dim: int  # F, of each
    normalized: bool  # a token's weights sum to 1


class Routing(NamedTuple):
    """What the balancing loss needs of a layer, or of all of them: sums over the tokens that are not padding."""

    probabilities_X: jax.Array
    counts_X: jax.Array  # of tokens sent to each expert; no gradient

    @classmethod
    def of(cls, probabilities_BTX: jax.Array, chosen_BTA: jax.Array, real_BT: jax.Array) -> "Routing":
        number = probabilities_BTX.shape[-1]
        weights_BT = real_BT.astype(jnp.float32)
        counts_X = (jax.nn.one_hot(chosen_BTA, number) * weights_BT[..., None, None]).sum((0, 1, 2))
        return cls((probabilities_BTX * weights_BT[..., None]).sum((0, 1)), jax.lax.stop_gradient(counts_X))


class ExpertsMlp(nnx.Module):
    """Gated feed-forward layers, of which each token passes through a few."""

    def __init__(self, width: int, experts: Experts, activation: str, *, rngs: nnx.Rngs):
        self.experts, self.activation = experts, activation
        number, inner = experts.number, experts.mlp_dim
        self.router = normal(rngs, (width, number), width**-0.5)
        self.gate = normal(rngs, (number, width, inner), width**-0.5)
        self.up = normal(rngs, (number, width, inner), width**-0.5)
        self.down = normal(rngs, (number, inner, width), inner**-0.5)

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, Routing]:
        """Return the experts' weighted sum, and how the tokens were sent. `real_BT` is false for padding."""
        scores_BTX = jnp.einsum("BTD,DX->BTX", x_BTD, self.router[...], preferred_element_type=jnp.float32)
        probabilities_BTX = jax.nn.softmax(scores_BTX, axis=-1)
        weights_BTA, chosen_BTA = jax.lax.top_k(probabilities_BTX, self.experts.per_token)
        if self.experts.normalized:
            weights_BTA /= weights_BTA.sum(-1, keepdims=True)
        matrices = Matrices(*(param.get_value() for param in (self.gate, self.up, self.down)))
        act = ACTIVATIONS[self.activation]
        out_BTD = _on_own_experts(act, x_BTD, chosen_BTA, weights_BTA, matrices, self.experts.number)
        return constrain(out_BTD, "B T D"), Routing.of(probabilities_BTX, chosen_BTA, real_BT)


class Matrices(NamedTuple):
    """Of some experts: each a DenseWeight."""

    gate: Any  # [X, D, F]
    up: Any
    down: Any  # [X, F, D]


def _on_own_experts(
    act: Activation, x_BTD: jax.Array, chosen_BTA: jax.Array, weights_BTA: jax.Array, matrices: Matrices, number: int
) -> jax.Array:
    """Compute the experts' weighted sum, [B, T, D], on every device for the tokens that it has.

    Where experts are split over devices, those share their tokens, and each takes the ones sent to its own experts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _apply(act, x_BTD, chosen_BTA, weights_BTA, matrices, jnp.int32(0), number)
    rows = PartitionSpec(*sharding.spec("B T", x_BTD.shape[:2], mesh), None)
    experts, inner = _split_of(matrices, mesh)
    shared = bool(experts) and all(axis in sharding.axes_of(rows[0]) for axis in experts)
    into, out = PartitionSpec(experts, None, inner), PartitionSpec(experts, inner, None)

    def body(x_BTD: jax.Array, chosen_BTA: jax.Array, weights_BTA: jax.Array, matrices: Matrices) -> jax.Array:
        first = jnp.int32(0)
        if experts:
            first = jax.lax.axis_index(experts) * jax.tree.leaves(matrices.gate)[0].shape[0]
        if shared:
            x_BTD, chosen_BTA, weights_BTA = (
                jax.lax.all_gather(array, experts, tiled=True) for array in (x_BTD, chosen_BTA, weights_BTA)
            )
        out_BTD = _apply(act, x_BTD, chosen_BTA, weights_BTA, matrices, first, number)
        if shared:
            out_BTD = jax.lax.psum_scatter(out_BTD, experts, scatter_dimension=0, tiled=True)
        return jax.lax.psum(out_BTD, (*inner, *(() if shared else experts)))

    return jax.shard_map(
        body, mesh=mesh, in_specs=(rows, rows, rows, Matrices(into, into, out)), out_specs=rows, check_vma=False
    )(x_BTD, chosen_BTA, weights_BTA, matrices)


def _split_of(matrices: Matrices, mesh: jax.sharding.AbstractMesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the mesh axes over which experts and F are split: all arrays of a quantized weight alike, or none."""
    found = []
    for letter, axes in (("X", (0, 0, 0)), ("F", (2, 2, 1))):
        split = {
            sharding.axes_of(sharding.spec(letter, array.shape[axis : axis + 1], mesh)[0])
            for weight, axis in zip(matrices, axes, strict=True)
            for array in jax.tree.leaves(weight)
        }
        found.append(split.pop() if len(split) == 1 else ())
    return found[0], found[1]


def _apply(
    act: Activation, x_BTD: jax.Array, chosen_BTA: jax.Array, weights_BTA: jax.Array, matrices: Matrices,
    first: jax.Array, number: int,
) -> jax.Array:  # fmt: skip
    """Return what the experts from `first` on, of `number` in all, add for some tokens, [B, T, D].

    Sorted by expert, so that each expert's matrices meet its tokens in one product. Where there are but a part of the
    experts, the pairs of tokens and experts are taken in as many pieces: those after the last of these experts' own
    are left out, and if all tokens are sent to them, none is dropped.
    """
    rows, length, width = x_BTD.shape
    per_token = chosen_BTA.shape[-1]
    x_ID, chosen_J, weights_J = x_BTD.reshape(-1, width), chosen_BTA.reshape(-1), weights_BTA.reshape(-1)
    own = jax.tree.leaves(matrices.gate)[0].shape[0]
    expert_J = chosen_J - first
    expert_J = jnp.where((expert_J >= 0) & (expert_J < own), expert_J, own)  # the others' come last
    order_J = jnp.argsort(expert_J, stable=True)
    ends_X = jnp.cumsum(jnp.bincount(expert_J, length=own + 1)[:own])
    pieces = number // own
    size = -(-order_J.size // pieces)
    order_J = jnp.pad(order_J, (0, pieces * size - order_J.size), constant_values=order_J.size)

    def piece(out_ID: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        def add(out_ID: jax.Array) -> jax.Array:
            at_J = jax.lax.dynamic_slice_in_dim(order_J, start, size)
            ends = jnp.clip(ends_X - start, 0, size)
            sizes_X = jnp.diff(ends, prepend=0)
            # What is left over goes to the last expert, with weight 0: no row's product may be left undefined.
            sizes_X = sizes_X.at[-1].add(size - ends[-1])
            weight_J = jnp.where(jnp.arange(size) < ends[-1], weights_J.at[at_J].get(mode="fill", fill_value=0), 0)
            token_J = jnp.minimum(at_J // per_token, x_ID.shape[0] - 1)
            sorted_JD = x_ID[token_J]
            hidden_JF = act(_ragged(sorted_JD, matrices.gate, sizes_X)) * _ragged(sorted_JD, matrices.up, sizes_X)
            out_JD = _ragged(hidden_JF, matrices.down, sizes_X)
            return out_ID.at[token_J].add(out_JD * weight_J[:, None].astype(out_JD.dtype))

        return jax.lax.cond(start < ends_X[-1], add, lambda out_ID: out_ID, out_ID) if pieces > 1 else add(out_ID), None

    out_ID, _ = jax.lax.scan(piece, jnp.zeros_like(x_ID), jnp.arange(pieces) * size)
    return out_ID.reshape(rows, length, width)


def _ragged(x: jax.Array, weight: Any, sizes_X: jax.Array) -> jax.Array:
    """Multiply rows of `x`, sorted by expert, by their expert's matrix [X, in, out]."""

    def product(x: jax.Array, weight: Any) -> jax.Array:
        return jax.lax.ragged_dot(x, dense(weight, x.dtype), sizes_X.astype(jnp.int32))

    # As in `linear`: float weights of every layer must not wait for the gradient.
    return jax.checkpoint(product)(x, weight) if isinstance(weight, Quantized) else product(x, weight)
