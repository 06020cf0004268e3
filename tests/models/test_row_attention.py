"""Attention row by row against plain attention and its automatic gradient, and against finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_it.models.attention import Scores, by_head, plain_attention
from jax_it.models.row_attention import row_attention

PLAIN = Scores()
CASES = {
    "t5": {"bias": True, "rate": 0.1},
    "gemma": {"scores": Scores(0.3, softcap=2.0)},
    "all": {"bias": True, "scores": Scores(0.3, softcap=2.0), "rate": 0.3},
}
ANY_CASE = pytest.mark.parametrize("name", CASES)


def make(dtype, bias=False, scores=PLAIN, rate=0.0):
    """Return (what both functions take beside arrays, the arrays: queries, keys, values and perhaps a bias)."""
    random = np.random.default_rng(0)
    shapes = [(3, 5, 4, 8), (3, 7, 2, 8), (3, 7, 2, 8), (4, 5, 7)][: 4 if bias else 3]
    mask = jnp.asarray(random.random((3, 5, 7)) < 0.6).at[0, 2].set(False)  # a query that may attend to nothing
    key = jax.random.key(1) if rate else None
    settings = {"scores": scores._replace(dropout=rate), "mask_BTS": mask, "dropout_key": key}
    dtypes = dtype, dtype, dtype, jnp.promote_types(dtype, jnp.float32)  # a bias is never narrower
    return settings, [jnp.asarray(random.standard_normal(s), d) for s, d in zip(shapes, dtypes, strict=False)]


def attend_and_sum(compute, settings, query, key, value, bias=None):
    """Return a sum of the result with random weights, and the result."""
    attended = compute(query, *by_head(key, value), bias=bias, **settings)
    weights = np.random.default_rng(1).standard_normal(attended.shape)
    return (attended.astype(jnp.promote_types(attended.dtype, jnp.float32)) * weights).sum(), attended


@ANY_CASE
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_rows_give_the_results_and_gradients_of_plain_attention(name, dtype, tolerance):
    settings, arrays = make(dtype, **CASES[name])
    wanted, found = (
        jax.jit(jax.grad(partial(attend_and_sum, compute, settings), tuple(range(len(arrays))), has_aux=True))(*arrays)
        for compute in (plain_attention, row_attention)
    )
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == plain.dtype
        ours, plain = np.float32(ours), np.float32(plain)
        np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance * max(1, np.abs(plain).max()))


@ANY_CASE
def test_rows_have_the_gradient_of_finite_differences(name):
    with jax.enable_x64(True):
        settings, arrays = make("float64", **CASES[name])

        def total(*arrays):
            return attend_and_sum(row_attention, settings, *arrays)[0]

        check_grads(total, arrays, order=1, modes="rev", eps=1e-5, atol=1e-8, rtol=1e-8)
