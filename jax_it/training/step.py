"""The training step: a pure function of (state, batch), compiled once for the mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_it import losses, sharding
from jax_it.config import Train
from jax_it.models import Model, Params
from jax_it.training.state import TrainState

Metrics = dict[str, jax.Array]


def token_loss(config: Train) -> losses.TokenLoss:
    """The loss of each target token that the config asks for."""
    if config.loss == "cross_entropy":
        return partial(losses.cross_entropy, label_smoothing=config.label_smoothing, z_loss=config.z_loss)
    return partial(losses.squared_error, scale=config.squared_error_scale, target=config.squared_error_target)


def make_train_step(
    model: Model,
    config: Train,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> state, metrics`, with its placement and donation.

    Gradients of micro-batches are summed, and divided once by the weight of all of them: the step is
    the same however many parts it is computed in.
    """
    gradient = jax.value_and_grad(partial(model.loss_sum, token_loss(config), config.loss_chunk), has_aux=True)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if model.run.dropout else None
        total, weight, gradients = _sum_gradients(gradient, state.params, batch, config.micro_batches, key)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), gradients)
        norm = optax.tree.norm(gradients)
        if config.clip:
            # The small constant is that of torch.nn.utils.clip_grad_norm_.
            scale = jnp.minimum(1, config.clip / (norm + 1e-6))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, memory = optimizer.update(gradients, state.optimizer, state.params)
        finite = jnp.isfinite(norm)
        params, memory = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), memory),
            (state.params, state.optimizer),
        )
        metrics = {
            "loss": total / jnp.maximum(weight, 1),
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        skipped = jnp.where(finite, 0, 1)
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=memory,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        return new, metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _sum_gradients(
    gradient: Callable, params: Params, batch: Any, parts: int, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Params]:
    """(loss sum, weight, summed gradients) over the batch, computed in so many parts one after another."""
    if parts == 1:
        (total, weight), gradients = gradient(params, batch, key)
        return total, weight, gradients
    # Every part takes every parts-th row, so that each device's rows stay where they are.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(sums: tuple, xs: tuple) -> tuple[tuple, None]:
        part, i = xs
        (total, weight), gradients = gradient(params, part, None if key is None else jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, sums, (total, weight, gradients)), None

    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]
