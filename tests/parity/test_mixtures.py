"""The router's balancing loss of mixtures of experts, as the training step adds it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_it import config, sharding
from jax_it.training.state import start, state_shardings
from jax_it.training.step import make_train_step
from tests.parity import cases, causal_cases, pytorch, references
from tests.parity.test_stored import TOLERANCE, check_gradients

MIXTURES = [case for case in causal_cases.CASES if causal_cases.is_mixture(case)]
# An optimizer that changes nothing and remembers the gradient.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, memory, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("case", cases.params(MIXTURES), indirect=True)
def test_loss_and_gradients_with_the_balancing_loss_are_those_of_pytorch(loaded, micro_batches):
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    settings = config.Train(
        router_aux_loss_coef=pytorch.BALANCE,
        max_grad_norm=0.0,
        loss_chunk=16,
        gradient_accumulation_steps=micro_batches,
    )
    params = jax.tree.map(lambda weight: weight + 0, loaded.params)  # which the step takes over
    state = start(*loaded.model.split(params), KEEP_GRADIENT)
    placed = state_shardings(loaded.model, state, mesh)
    step = make_train_step(loaded.model, settings, KEEP_GRADIENT, lambda step: 0.0, mesh, placed)
    state, metrics = step(state, loaded.batch)
    reference = references.read(loaded.case)
    assert reference.balance is not None
    assert float(metrics["loss"]) == pytest.approx(reference.loss + pytorch.BALANCE * reference.balance, rel=TOLERANCE)
    check_gradients(cases.by_name(loaded.model, state.optimizer), reference.balance_gradients)


@pytest.mark.parametrize("case", cases.params(MIXTURES))
def test_the_balancing_loss_moves_gradients_by_more_than_the_tolerance(case):
    reference = references.read(case)
    moved = [
        np.abs(sketch - reference.gradients[name]).max() / sketch[0]
        for name, sketch in reference.balance_gradients.items()
        if ".gate.weight" in name
    ]
    assert moved and min(moved) > 100 * TOLERANCE
