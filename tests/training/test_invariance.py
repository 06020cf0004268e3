"""Promise 1: the same loss and gradients, however they are computed."""

import itertools

import jax
import numpy as np
import pytest

from tests.training.gradients import MESHES, assert_close, loss_and_gradients

MODELS = ["tiny", "tiny_llama", "tiny_adapted"]  # T5; a causal model with grouped heads; that with adapters alone

# Every axis, all together, micro-batches and packed rows in the default tests; the whole product takes some minutes.
SHORT = {("tiny", *case) for case in (
    ("1 device", 1, "packed"), ("8 fsdp", 2, "padded"), ("8 data", 4, "packed"), ("2 x 2 x 2", 4, "packed"),
    ("2 x 4 tensor", 1, "padded"), ("2 x 2 context x 2", 2, "padded"), ("2 slices", 1, "packed"),
)}  # fmt: skip
SHORT |= {("tiny_llama", *case) for case in (
    ("1 device", 4, "packed"), ("2 x 2 x 2", 2, "padded"), ("2 x 4 tensor", 1, "packed"), ("4 context", 2, "packed"),
    ("2 x 2 context x 2", 1, "packed"), ("fsdp over 2 slices", 1, "padded"),
)}  # fmt: skip
SHORT |= {("tiny_adapted", "2 x 2 x 2", 4, "packed")}
CASES = [
    pytest.param(*case, marks=[] if case in SHORT else [pytest.mark.slow])
    for case in itertools.product(MODELS, MESHES, [1, 2, 4], ["padded", "packed"])
]


@pytest.fixture(scope="module")
def expected(request):
    """`expected(model)`: the loss and gradients of padded rows on one device, computed at once."""
    found = {}

    def expected(name):
        if name not in found:
            model, params, padded, _ = request.getfixturevalue(name)
            found[name] = loss_and_gradients(model, params, padded, MESHES["1 device"], 1)
        return found[name]

    return expected


@pytest.mark.parametrize(("name", "mesh", "micro_batches", "rows"), CASES)
def test_loss_and_gradients_do_not_depend_on_how_they_are_computed(request, expected, name, mesh, micro_batches, rows):
    tiny = request.getfixturevalue(name)
    found = loss_and_gradients(tiny.model, tiny.params, getattr(tiny, rows), MESHES[mesh], micro_batches)
    assert_close(found, expected(name), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_not_trivial(expected, name):
    norms = jax.tree.leaves(jax.tree.map(np.linalg.norm, expected(name)[1]))
    assert min(norms) > 1e-4, "a weight without gradient would make the comparison empty"


@pytest.mark.parametrize("options", [{"loss": "squared_error"}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
def test_every_loss_is_a_sum_over_all_parts(tiny, options):
    one = loss_and_gradients(tiny.model, tiny.params, tiny.padded, MESHES["1 device"], 1, **options)
    many = loss_and_gradients(tiny.model, tiny.params, tiny.packed, MESHES["2 x 2 x 2"], 4, **options)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(one[1]))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1)), many[1], one[1])
