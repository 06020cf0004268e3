"""Schedules and optimizers against their definitions, written out in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.config import Optimizer
from jax_it.training.optimizer import make_optimizer, make_schedule

PEAK, WARMUP, TOTAL, DECAY = 0.4, 4, 20, 6


def expected_rate(name, step, final):
    if step < WARMUP:
        return PEAK * step / WARMUP
    done = (step - WARMUP) / (TOTAL - WARMUP)
    if name == "constant":
        return PEAK
    if name == "linear":
        return PEAK * (1 - done * (1 - final))
    if name == "cosine":
        return PEAK * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    if name == "rsqrt":
        return PEAK * math.sqrt(WARMUP / step)
    left = min(max((step - (TOTAL - DECAY)) / DECAY, 0), 1)  # wsd
    return PEAK * (1 - left * (1 - final))


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "rsqrt", "wsd"])
def test_a_schedule_warms_up_from_0_and_follows_its_formula(name, final):
    schedule = make_schedule(Optimizer(learning_rate=PEAK, schedule=name, final_lr_ratio=final), TOTAL, WARMUP, DECAY)
    found = [float(schedule(step)) for step in range(TOTAL + 1)]
    np.testing.assert_allclose(
        found, [expected_rate(name, step, final) for step in range(TOTAL + 1)], rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "rsqrt", "wsd"])
def test_a_schedule_without_warm_up_starts_at_the_peak(name):
    schedule = make_schedule(Optimizer(learning_rate=PEAK, schedule=name), TOTAL, 0, DECAY)
    assert float(schedule(0)) == pytest.approx(PEAK)


LETTERS = {"query": "L D N H", "norm": "L D", "bias": "E N", "head": "V D"}
SHAPES = {"query": (3, 8, 2, 5), "norm": (3, 8), "bias": (4, 2), "head": (7, 8)}


def random_tree(seed):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def updates(config, steps=3):
    optimizer = make_optimizer(config, lambda step: jnp.float32(config.learning_rate), LETTERS)
    params = random_tree(0)
    state = optimizer.init(params)
    for step in range(steps):
        update, state = optimizer.update(random_tree(step + 1), state, params)
        params = jax.tree.map(jnp.add, params, update)
    return params


def test_adamw_is_its_formula_and_decays_matrices_alone():
    config = Optimizer(name="adamw", learning_rate=0.01, weight_decay=0.1)
    found = updates(config)
    for name, start in random_tree(0).items():
        p, m, v = np.asarray(start, np.float64), 0.0, 0.0
        for step in range(1, 4):
            g = np.asarray(random_tree(step)[name], np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            decay = 0.1 if name in ("query", "head") else 0.0
            p = p - 0.01 * (direction + decay * p)
        # A float32 step: some 1e-7 of values of order 1, three times.
        np.testing.assert_allclose(found[name], p, atol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate_in_every_optimizer(name):
    """Without a gradient a matrix shrinks by the factor 1 - rate * decay a step, and what is no matrix stays."""
    config = Optimizer(name=name, learning_rate=0.01, weight_decay=0.1)
    rates = [0.01, 0.0, 0.002]
    optimizer = make_optimizer(config, lambda step: jnp.asarray(rates)[step], LETTERS)
    start = params = random_tree(0)
    state = optimizer.init(params)
    for _ in rates:
        update, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = jax.tree.map(jnp.add, params, update)
    shrunk = (1 - 0.01 * 0.1) * (1 - 0.002 * 0.1)
    for name, before in start.items():
        expected = shrunk if name in ("query", "head") else 1.0
        np.testing.assert_allclose(params[name], expected * np.asarray(before, np.float64), rtol=1e-6)


def test_lion_is_its_formula():
    found = updates(Optimizer(name="lion", learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99))
    p, m = np.asarray(random_tree(0)["head"], np.float64), 0.0
    for step in range(1, 4):
        g = np.asarray(random_tree(step)["head"], np.float64)
        p, m = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p), 0.99 * m + 0.01 * g
    np.testing.assert_allclose(found["head"], p, atol=2e-6)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_has_momentum_of_gradients_alone(momentum):
    found = updates(Optimizer(name="sgd", learning_rate=0.01, weight_decay=0.1, beta1=momentum))
    for name, start in random_tree(0).items():
        p, m = np.asarray(start, np.float64), 0.0
        for step in range(1, 4):
            m = momentum * m + np.asarray(random_tree(step)[name], np.float64)
            decay = 0.1 if name in ("query", "head") else 0.0
            p = p - 0.01 * (m + decay * p)
        np.testing.assert_allclose(found[name], p, atol=2e-6)


def adafactor_reference(params, gradients, rate, weight_decay):
    """Adafactor for one matrix or vector, from section 9 of the paper, with optax's constants; float64."""
    p = params.astype(np.float64)
    row = column = full = 0.0
    for step, gradient in enumerate(gradients, 1):
        g = gradient.astype(np.float64)
        decay = 1 - step**-0.8
        square = g**2 + 1e-30
        if p.ndim == 2 and min(p.shape) >= 128:
            row = decay * row + (1 - decay) * square.mean(1)
            column = decay * column + (1 - decay) * square.mean(0)
            update = g / np.sqrt(np.outer(row, column) / row.mean())
        else:
            full = decay * full + (1 - decay) * square
            update = g / np.sqrt(full)
        update /= max(1.0, np.sqrt((update**2).mean()))
        p = p - rate * (update * max(np.sqrt((p**2).mean()), 1e-3) + weight_decay * p)
    return p


def test_adafactor_sees_each_layer_as_a_matrix_of_its_own():
    letters = {"query": "L D N H", "output": "L N H D", "norm": "L D"}
    shapes = {"query": (2, 128, 2, 64), "output": (2, 2, 64, 130), "norm": (2, 128)}
    random = np.random.default_rng(0)
    scales = np.array([1.0, 30.0])  # layers of different size: statistics of one must not reach the other
    tree = lambda: {  # noqa: E731
        name: (random.normal(size=shape) * scales.reshape(2, *[1] * (len(shape) - 1))).astype(np.float32)
        for name, shape in shapes.items()
    }
    start, gradients = tree(), [tree() for _ in range(3)]
    config = Optimizer(name="adafactor", weight_decay=0.1)
    optimizer = make_optimizer(config, lambda step: jnp.float32(0.01), letters)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, update)
    matrices = {"query": (128, 128), "output": (128, 130), "norm": (128,)}
    for name, shape in matrices.items():
        for layer in range(2):
            own = [g[name][layer].reshape(shape) for g in gradients]
            decay = 0.0 if name == "norm" else 0.1
            expected = adafactor_reference(start[name][layer].reshape(shape), own, 0.01, decay)
            found = np.asarray(params[name][layer]).reshape(shape)
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * scales[layer])


def test_adafactor_keeps_rows_and_columns_instead_of_squares():
    letters = {"query": "L D N H"}
    params = {"query": jnp.ones((2, 128, 2, 64))}
    optimizer = make_optimizer(Optimizer(name="adafactor"), lambda step: jnp.float32(0.01), letters)
    held = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))
    assert held < params["query"].size / 20
