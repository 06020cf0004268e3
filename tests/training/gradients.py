"""The loss and gradients of the real training step, for tests that compare ways to compute them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.config import Mesh, Optimizer, Train
from jax_it.models import Model, Params
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
    "4 context": Mesh(data=1, context=4),
    "2 x 2 context x 2": Mesh(data=1, fsdp=2, context=2, tensor=2),
    "2 x 2 expert": Mesh(data=1, fsdp=2, expert=2),
    "4 expert": Mesh(data=2, expert=4),
    "2 expert x 2 x 2": Mesh(data=1, expert=2, context=2, tensor=2),
    "2 slices": Mesh(data=2, fsdp=4, slices=2),
    "fsdp over 2 slices": Mesh(data=1, fsdp=4, tensor=2, slices=2, across_slices="fsdp"),
}


def loss_and_gradients(
    model: Model, params: Params, batch: Any, mesh_config: Mesh, micro_batches: int, **train: Any
) -> tuple[float, Params]:
    """The gradients of what is trained: plain gradient descent at rate 1 gives them away."""
    optimizer_config = Optimizer(name="sgd", learning_rate=1.0, schedule="constant", beta1=0.0)
    config = Train(
        gradient_accumulation_steps=micro_batches, optimizer=optimizer_config, max_grad_norm=0.0, loss_chunk=64, **train
    )
    sizes = [max(getattr(mesh_config, axis), 1) for axis in sharding.AXES]
    mesh = sharding.make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
    before = jax.device_get(model.split(params)[0])
    with jax.set_mesh(mesh):
        schedule = make_schedule(optimizer_config, 10, 0, 0)
        optimizer = make_optimizer(optimizer_config, schedule, model.trained_logical_axes)
        # A copy: the step donates its state, and placing an array where it lies would not make one.
        state = start(*model.split(jax.tree.map(jnp.copy, params)), optimizer)
        shardings = state_shardings(model, state, mesh)
        state = jax.device_put(state, shardings)
        step = make_train_step(model, config, optimizer, schedule, mesh, shardings)
        new, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    gradients = jax.tree.map(lambda old, new: old - new, before, jax.device_get(new.params))
    return float(metrics["loss"]), gradients


def assert_close(found: tuple[float, Params], expected: tuple[float, Params], tolerance: float) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found[1], expected[1])
