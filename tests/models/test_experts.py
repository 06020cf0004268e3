"""Mixtures of experts against a loop over tokens in float64, on one device and on several."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_it import sharding
from jax_it.config import Mesh
from jax_it.models.experts import Experts, ExpertsMlp

WIDTH, INNER, NUMBER, PER_TOKEN, ROWS, LENGTH = 8, 16, 8, 2, 8, 4


def silu(x):
    return x / (1 + np.exp(-x))


def by_token(weights, x_BTD, normalized):
    """Every token through its experts, one after another."""
    router, gate, up, down = (np.asarray(weights[name], np.float64) for name in ("router", "gate", "up", "down"))
    out = np.zeros(x_BTD.shape)
    for b, t in np.ndindex(x_BTD.shape[:2]):
        x = np.asarray(x_BTD[b, t], np.float64)
        scores = np.exp(x @ router)
        scores /= scores.sum()
        chosen = np.argsort(-scores)[:PER_TOKEN]
        total = scores[chosen].sum() if normalized else 1
        for e in chosen:
            out[b, t] += scores[e] / total * ((silu(x @ gate[e]) * (x @ up[e])) @ down[e])
    return out


def layer(skew: float, normalized: bool = True) -> tuple[Any, Any]:
    """Random experts; with a skew nearly all tokens are sent to the first two."""
    module = ExpertsMlp(WIDTH, Experts(NUMBER, PER_TOKEN, INNER, normalized), "silu", rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(module)
    weights = dict(nnx.to_pure_dict(state))
    weights["router"] = weights["router"].at[:, :2].add(skew)
    return graph, weights


def inputs() -> jax.Array:
    return jnp.abs(jax.random.normal(jax.random.key(1), (ROWS, LENGTH, WIDTH)))


def run(graph: Any, weights: Any, x_BTD: jax.Array) -> jax.Array:
    return nnx.merge(graph, weights)(x_BTD, jnp.ones(x_BTD.shape[:2], bool))[0]


MESHES = [
    Mesh(data=8), Mesh(data=1, expert=8), Mesh(data=1, expert=4, tensor=2), Mesh(data=2, expert=2, context=2),
    Mesh(data=1, fsdp=2, expert=2, tensor=2),
]  # fmt: skip


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_each_token_passes_through_its_experts(skew, normalized):
    graph, weights = layer(skew, normalized)
    x_BTD = inputs()
    found = jax.jit(run, static_argnums=0)(graph, weights, x_BTD)
    wanted = by_token(weights, x_BTD, normalized)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())  # a few roundings of 6e-8


@pytest.mark.parametrize("skew", [0.0, 3.0], ids=["even", "all to two experts"])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_experts_on_several_devices_drop_no_token_and_give_the_same_gradients(config, skew):
    graph, weights = layer(skew)
    x_BTD = inputs()
    if skew:
        scores = np.asarray(x_BTD @ weights["router"])
        assert (np.argsort(-scores)[..., :PER_TOKEN] < 2).mean() > 0.9

    def value(weights, x_BTD):
        out = run(graph, weights, x_BTD)
        return jnp.square(out).sum(), out

    compute = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    (_, alone), gradients = jax.jit(compute)(weights, x_BTD)
    with jax.set_mesh(sharding.make_mesh(config)):
        (_, together), others = jax.jit(compute)(weights, x_BTD)
    np.testing.assert_allclose(together, by_token(weights, x_BTD, True), rtol=0, atol=1e-6 * np.abs(alone).max())
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        # Sums of up to 64 tokens' products in another order.
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-6 * np.abs(one).max())


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (8, 1)])
def test_rows_that_do_not_divide_are_whole_on_every_device(shape):
    graph, weights = layer(0.0)
    x_BTD = jax.random.normal(jax.random.key(2), (*shape, WIDTH))
    with jax.set_mesh(sharding.make_mesh(Mesh(data=2, expert=2, context=2))):
        found = jax.jit(run, static_argnums=0)(graph, weights, x_BTD)
    wanted = by_token(weights, x_BTD, True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
