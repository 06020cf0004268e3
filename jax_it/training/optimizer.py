"""Optimizers and learning-rate schedules of optax, as the config asks for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_it.config import Optimizer
from jax_it.models.weights import is_matrix


def make_schedule(config: Optimizer, total_steps: int, warmup: int, decay: int) -> optax.Schedule:
    """Return the learning rate of each step, counted from 0. Warm-up is linear and starts at 0, as in Transformers."""
    peak, final = config.learning_rate, config.learning_rate * config.final_lr_ratio
    rest, start = max(total_steps - warmup, 1), max(warmup, 1)
    after: dict[str, Callable[[], optax.Schedule]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_lr_ratio),
        "rsqrt": lambda: lambda step: peak * jnp.sqrt(start / jnp.maximum(step + start, start)),
        "wsd": lambda: optax.linear_schedule(peak, final, max(decay, 1), transition_begin=max(rest - decay, 0)),
    }
    schedule = after[config.schedule]()
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def make_optimizer(config: Optimizer, schedule: optax.Schedule, logical_axes: Any) -> optax.GradientTransformation:
    """Return the optimizer. Each step takes learning rate * weight decay of a weight away, whichever optimizer it is.

    Weight decay is thus decoupled from gradients and momentum (Loshchilov & Hutter 2019). It spares norms and
    relative-position biases. `logical_axes` is the params' tree of logical axes ("L D N H").
    """
    c = config
    directions: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(c.beta1, c.beta2, c.epsilon),
        "lion": lambda: optax.scale_by_lion(c.beta1, c.beta2),
        "sgd": lambda: optax.trace(c.beta1) if c.beta1 else optax.identity(),
        "adafactor": lambda: _adafactor(logical_axes),
    }
    decay = optax.add_decayed_weights(c.weight_decay, jax.tree.map(is_matrix, logical_axes))
    return optax.chain(directions[c.name](), decay, optax.scale_by_learning_rate(schedule))


def _adafactor(logical_axes: Any) -> optax.GradientTransformation:
    """Return Adafactor's direction (Shazeer & Stern 2018) on each layer's matrices, before the learning rate.

    Our arrays stack layers and split heads. Factoring, clipping and scaling by the weights' size are
    meant for a layer's matrix [D, N * H], so each array is taken apart into such before, and put back after.
    """
    of_matrix = optax.chain(optax.adafactor(), optax.scale(-1))  # without a rate it is chained with scale(-1)

    def over_layers(names: str, f: Callable) -> Callable:
        return jax.vmap(f) if names.startswith("L ") else f

    def init(params: Any) -> Any:
        return jax.tree.map(
            lambda names, p: over_layers(names, of_matrix.init)(_as_matrices(names, p)), logical_axes, params
        )

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(names: str, gradient: jax.Array, state: Any, param: jax.Array) -> tuple[jax.Array, Any]:
            matrices = (_as_matrices(names, gradient), state, _as_matrices(names, param))
            update, state = over_layers(names, of_matrix.update)(*matrices)
            return update.reshape(param.shape), state

        pairs = jax.tree.map(one, logical_axes, gradients, state, params)
        updates = jax.tree.map(lambda names, pair: pair[0], logical_axes, pairs)
        return updates, jax.tree.map(lambda names, pair: pair[1], logical_axes, pairs)

    return optax.GradientTransformation(init, update)


def _as_matrices(logical_axes: str, array: jax.Array) -> jax.Array:
    """Merge the neighbouring axes N and H of an array."""
    axes = logical_axes.split()
    if "H" not in axes:
        return array
    at = axes.index("N" if "N" in axes else "K")
    return array.reshape(*array.shape[:at], -1, *array.shape[at + 2 :])
