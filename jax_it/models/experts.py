"""Mixtures of experts: each token goes to the few experts that its router scores highest (Shazeer et al. 2017)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import layers
from jax_it.models.linear import dense
from jax_it.models.quantized import Quantized
from jax_it.sharding import constrain


class Experts(NamedTuple):
    """The experts of a layer."""

    number: int  # X
    per_token: int
    feed_forward: int  # F, of each
    normalised: bool  # a token's weights sum to 1


class Routing(NamedTuple):
    """What the balancing loss needs of a layer, or of all of them: sums over the tokens that are no padding."""

    probabilities_X: jax.Array
    counts_X: jax.Array  # of tokens sent to each expert; no gradient

    @classmethod
    def of(cls, probabilities_BTX: jax.Array, chosen_BTC: jax.Array, real_BT: jax.Array) -> "Routing":
        number = probabilities_BTX.shape[-1]
        weights_BT = real_BT.astype(jnp.float32)
        counts_X = (jax.nn.one_hot(chosen_BTC, number) * weights_BT[..., None, None]).sum((0, 1, 2))
        return cls((probabilities_BTX * weights_BT[..., None]).sum((0, 1)), jax.lax.stop_gradient(counts_X))


class ExpertsMlp(nnx.Module):
    """Gated feed-forward layers, of which each token passes through a few."""

    def __init__(self, width: int, experts: Experts, activation: str, *, rngs: nnx.Rngs):
        self.experts, self.activation = experts, activation
        number, inner = experts.number, experts.feed_forward
        self.router = layers.normal(rngs, (width, number), width**-0.5)
        self.gate = layers.normal(rngs, (number, width, inner), width**-0.5)
        self.up = layers.normal(rngs, (number, width, inner), width**-0.5)
        self.down = layers.normal(rngs, (number, inner, width), inner**-0.5)

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, Routing]:
        """The experts' weighted sum, and how the tokens were sent. `real_BT` is false for padding."""
        scores_BTX = jnp.einsum("BTD,DX->BTX", x_BTD, self.router[...], preferred_element_type=jnp.float32)
        probabilities_BTX = jax.nn.softmax(scores_BTX, axis=-1)
        weights_BTC, chosen_BTC = jax.lax.top_k(probabilities_BTX, self.experts.per_token)
        if self.experts.normalised:
            weights_BTC /= weights_BTC.sum(-1, keepdims=True)
        rows, length, width = x_BTD.shape
        out_ID = self._apply(
            x_BTD.reshape(-1, width), chosen_BTC.reshape(rows * length, -1), weights_BTC.reshape(rows * length, -1)
        )
        out_BTD = constrain(out_ID.reshape(rows, length, width), "B T D")
        return out_BTD, Routing.of(probabilities_BTX, chosen_BTC, real_BT)

    def _apply(self, x_ID: jax.Array, chosen_IC: jax.Array, weights_IC: jax.Array) -> jax.Array:
        """The layer for tokens I, sorted by expert, so that each expert's weights meet its tokens in one product."""
        order = jnp.argsort(chosen_IC.reshape(-1), stable=True)
        token = order // self.experts.per_token
        sizes_X = jnp.bincount(chosen_IC.reshape(-1), length=self.experts.number)
        sorted_JD = x_ID[token]
        act = layers.ACTIVATIONS[self.activation]
        hidden_JF = act(_ragged(sorted_JD, self.gate, sizes_X)) * _ragged(sorted_JD, self.up, sizes_X)
        out_JD = _ragged(hidden_JF, self.down, sizes_X)
        out_JD *= weights_IC.reshape(-1)[order][:, None].astype(out_JD.dtype)
        return jnp.zeros_like(x_ID).at[token].add(out_JD)


def _ragged(x_JI: jax.Array, param: nnx.Param, sizes_X: jax.Array) -> jax.Array:
    """Rows of `x`, sorted by expert, times their expert's matrix [X, in, out]."""
    weight = param.get_value()

    def product(x_JI: jax.Array, weight: Any) -> jax.Array:
        return jax.lax.ragged_dot(x_JI, dense(weight, x_JI.dtype), sizes_X.astype(jnp.int32))

    # As in `linear`: float weights of every layer must not wait for the gradient.
    return jax.checkpoint(product)(x_JI, weight) if isinstance(weight, Quantized) else product(x_JI, weight)
