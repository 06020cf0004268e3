"""Promise 1: the same loss and gradients, however they are computed."""

import itertools

import jax
import numpy as np
import pytest

from jax_it import sharding
from jax_it.config import Mesh, Optimizer, Train
from jax_it.training.optimizer import make_optimizer, make_schedule
from jax_it.training.state import start, state_shardings
from jax_it.training.step import make_train_step

MESHES = {
    "1 device": Mesh(data=1),
    "2 data": Mesh(data=2),
    "2 fsdp": Mesh(data=1, fsdp=2),
    "2 tensor": Mesh(data=1, tensor=2),
    "8 data": Mesh(data=8),
    "8 fsdp": Mesh(data=1, fsdp=8),
    "2 x 2 x 2": Mesh(data=2, fsdp=2, tensor=2),
    "2 x 4 tensor": Mesh(data=1, fsdp=2, tensor=4),
}


def loss_and_gradients(tiny, batch, mesh_config, micro_batches, **train):
    """The loss and the gradients of the real training step: plain gradient descent at rate 1 gives them away."""
    optimizer_config = Optimizer(name="sgd", learning_rate=1.0, schedule="constant", beta1=0.0)
    config = Train(micro_batches=micro_batches, optimizer=optimizer_config, clip=0.0, loss_chunk=8, **train)
    sizes = [max(size, 1) for size in vars(mesh_config).values()]
    mesh = sharding.make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        schedule = make_schedule(optimizer_config, 10, 0, 0)
        optimizer = make_optimizer(optimizer_config, schedule, tiny.model.letters)
        # A copy: the step donates its state, and placing an array where it lies would not make one.
        state = start(jax.tree.map(lambda p: p + 0, tiny.params), {}, optimizer)
        shardings = state_shardings(tiny.model, state, mesh)
        state = jax.device_put(state, shardings)
        step = make_train_step(tiny.model, config, optimizer, schedule, mesh, shardings)
        new, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    gradients = jax.tree.map(
        lambda old, new: np.asarray(old) - np.asarray(new), tiny.params, jax.device_get(new.params)
    )
    return float(metrics["loss"]), gradients


@pytest.fixture(scope="module")
def expected(tiny):
    return loss_and_gradients(tiny, tiny.padded, MESHES["1 device"], 1)


# Each value of each axis in the default tests; their whole product takes some minutes of compiling.
SHORT = [("1 device", 1, "packed"), ("2 data", 4, "padded"), ("2 tensor", 2, "packed"), ("8 fsdp", 2, "padded")]
SHORT += [("2 fsdp", 1, "padded"), ("8 data", 1, "packed"), ("2 x 2 x 2", 4, "packed"), ("2 x 4 tensor", 1, "padded")]
CASES = [
    pytest.param(*case, marks=[] if case in SHORT else [pytest.mark.slow])
    for case in itertools.product(MESHES, [1, 2, 4], ["padded", "packed"])
]


@pytest.mark.parametrize(("mesh", "micro_batches", "rows"), CASES)
def test_loss_and_gradients_do_not_depend_on_how_they_are_computed(tiny, expected, mesh, micro_batches, rows):
    loss, gradients = loss_and_gradients(tiny, getattr(tiny, rows), MESHES[mesh], micro_batches)
    np.testing.assert_allclose(loss, expected[0], atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), gradients, expected[1])


def test_the_reference_is_not_trivial(expected):
    norms = jax.tree.leaves(jax.tree.map(np.linalg.norm, expected[1]))
    assert min(norms) > 1e-4, "a weight without gradient would make the comparison empty"


@pytest.mark.parametrize("options", [{"loss": "squared_error"}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
def test_every_loss_is_a_sum_over_all_parts(tiny, options):
    one = loss_and_gradients(tiny, tiny.padded, MESHES["1 device"], 1, **options)
    many = loss_and_gradients(tiny, tiny.packed, MESHES["2 x 2 x 2"], 4, **options)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(one[1]))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1)), many[1], one[1])
