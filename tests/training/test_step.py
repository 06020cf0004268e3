"""What a single training step does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import sharding
from jax_it.config import Config, Mesh, Model, Optimizer, Train
from jax_it.training.optimizer import make_optimizer, make_schedule
from jax_it.training.state import start, state_shardings
from jax_it.training.step import HISTORY, make_train_step, prepare

# One step of AdamW on the tiny model of conftest.py. If a change of the model, the loss, the optimizer or
# the batch is meant to change numbers, put the new ones here and say why in the commit; otherwise find out.
GOLDEN_LOSSES = (4.6611, 4.1014, 3.7470)


def run(tiny, steps=1, batch=None, **train):
    config = Train(**{"optimizer": Optimizer(learning_rate=0.01, schedule="constant"), **train})
    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        schedule = make_schedule(config.optimizer, 10, 0, 0)
        optimizer = make_optimizer(config.optimizer, schedule, tiny.model.trained_logical_axes)
        state = start(*tiny.model.split(jax.tree.map(jnp.copy, tiny.params)), optimizer)
        step = make_train_step(tiny.model, config, optimizer, schedule, mesh, state_shardings(tiny.model, state, mesh))
        found = []
        for _ in range(steps):
            state, metrics = step(state, tiny.padded if batch is None else batch)
            found.append({name: float(value) for name, value in metrics.items()})
    return state, found


def test_three_steps_give_the_losses_that_they_always_gave(tiny):
    _, metrics = run(tiny, steps=3)
    assert [m["loss"] for m in metrics] == pytest.approx(GOLDEN_LOSSES, abs=2e-3), "see the comment at GOLDEN_LOSSES"


def test_clipping_bounds_the_update_but_reports_the_norm_before(tiny):
    plain = Optimizer(name="sgd", learning_rate=1.0, schedule="constant", beta1=0.0)
    state, metrics = run(tiny, max_grad_norm=0.1, optimizer=plain)
    moved = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), state.params, tiny.params)
    assert float(jnp.sqrt(sum(jax.tree.leaves(moved)))) == pytest.approx(0.1, rel=1e-4)
    assert metrics[0]["grad_norm"] > 0.1


def test_a_non_finite_gradient_changes_nothing_and_is_counted(tiny):
    bad = tiny.padded._replace(weights_BT=tiny.padded.weights_BT * np.float32("nan"))
    state, _ = run(tiny, steps=2, batch=bad)
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny.params)
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (2, 2, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.optimizer))


@pytest.mark.parametrize("name, micro_batches", [("adamw", 1), ("adafactor", 2), ("lion", 1), ("sgd", 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_keeps_the_types_of_bfloat16_weights_and_memory(tiny, name, micro_batches, dtype):
    """Else a checkpoint could not be restored into the state that a restart makes."""
    model = dataclasses.replace(tiny.model, options=tiny.model.options._replace(dtype=jnp.dtype(dtype)))
    config = Config(
        model=Model(param_dtype="bfloat16"),
        train=Train(gradient_accumulation_steps=micro_batches, optimizer=Optimizer(name=name)),
    )
    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        prepared = prepare(model, config, mesh, {}, total_steps=10, warmup=1, decay=1)
        after, _ = jax.eval_shape(prepared.step, prepared.shapes, tiny.padded)
    found, expected = (jax.tree.map(lambda leaf: str(leaf.dtype), state) for state in (after, prepared.shapes))
    assert found == expected and {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("bfloat16")}


def test_a_batch_without_weights_moves_nothing_by_its_loss(tiny):
    empty = tiny.padded._replace(weights_BT=tiny.padded.weights_BT * 0)
    _, metrics = run(tiny, batch=empty)
    assert metrics[0]["loss"] == 0 and metrics[0]["grad_norm"] == 0


# Each gradient is a spike, at half the mean.
SPIKES = {"optimizer": Optimizer(learning_rate=1e-5, schedule="constant"), "max_spike": 0.5}


def test_a_spike_changes_nothing_and_is_counted_once_enough_norms_are_known(tiny):
    before, metrics = run(tiny, steps=HISTORY, max_grad_norm=0.01, **SPIKES)
    assert metrics[-1]["skipped"] == 0
    after, metrics = run(tiny, steps=HISTORY + 2, max_grad_norm=0.01, **SPIKES)
    assert [m["skipped"] for m in metrics[HISTORY:]] == [m["skipped_in_a_row"] for m in metrics[HISTORY:]] == [1, 2]
    assert int(after.step) == HISTORY + 2 and int(after.skipped) == 2
    for name in ("params", "optimizer", "norms"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


def test_a_gradient_within_the_clip_is_no_spike_and_0_asks_for_none(tiny):
    for changes in {"max_grad_norm": 1e6}, {"max_grad_norm": 0.01, "max_spike": 0.0}:
        _, metrics = run(tiny, steps=HISTORY + 2, **SPIKES | changes)
        assert metrics[-1]["skipped"] == 0


def test_the_mean_of_norms_weighs_each_a_hundredth_less_than_the_next(tiny):
    _, metrics = run(tiny, steps=30)
    norms = np.array([m["grad_norm"] for m in metrics])
    assert metrics[0]["grad_norm_mean"] == 0
    for number in (1, 2, 10, 29):
        expected = np.average(norms[:number], weights=0.99 ** np.arange(number)[::-1])
        assert metrics[number]["grad_norm_mean"] == pytest.approx(expected, rel=1e-5)


def test_a_step_of_adapters_leaves_all_other_weights_as_they_are(tiny_adapted):
    trained, frozen = tiny_adapted.model.split(tiny_adapted.params)
    state, metrics = run(tiny_adapted, steps=3)
    assert metrics[2]["loss"] < metrics[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state.params, trained)), strict=True))
    assert jax.tree.structure(state.params) == jax.tree.structure(trained)
    memory = state.optimizer[0]
    assert jax.tree.structure(memory.mu) == jax.tree.structure(memory.nu) == jax.tree.structure(trained)


def test_adapters_and_what_is_frozen_lie_where_their_letters_say(tiny_adapted):
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=4))
    model = tiny_adapted.model
    optimizer = make_optimizer(Optimizer(), lambda step: 0.1, model.trained_logical_axes)
    state = jax.eval_shape(lambda params: start(*model.split(params), optimizer), tiny_adapted.params)
    placed = state_shardings(model, state, mesh)
    assert placed.frozen == sharding.shardings(model.logical_axes, state.frozen, mesh)
    up = placed.params["layers"]["mlp"]["up"]
    assert up == placed.optimizer[0].mu["layers"]["mlp"]["up"]
    assert up["a"].spec == jax.sharding.PartitionSpec(None, ("fsdp",), None)  # [L, D, R]
    assert up["b"].spec == jax.sharding.PartitionSpec(None, None, ("tensor",))  # [L, R, F]


def test_adamw_state_lies_where_its_weights_lie(tiny):
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=4))
    optimizer = make_optimizer(Optimizer(), lambda step: 0.1, tiny.model.logical_axes)
    state = jax.eval_shape(lambda params: start(params, {}, optimizer), tiny.params)
    placed = state_shardings(tiny.model, state, mesh)
    memory = placed.optimizer[0].mu["encoder"]["layers"]["mlp"]["up"]
    assert memory == placed.params["encoder"]["layers"]["mlp"]["up"]
    assert memory.spec == jax.sharding.PartitionSpec(None, ("fsdp",), ("tensor",))
    assert placed.step.spec == jax.sharding.PartitionSpec()
