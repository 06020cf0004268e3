"""The training step: a pure function of (state, batch), compiled once for the mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_it import losses, sharding
from jax_it.config import Config, Train
from jax_it.models import Model, Params
from jax_it.training.optimizer import make_optimizer, make_schedule
from jax_it.training.state import TrainState, start, state_shardings

Metrics = dict[str, jax.Array]

# XLA gathers weights beside other work on a v5e by itself, on a v5p and a v6e only if told (`jax-it plan` shows it).
TPU_OPTIONS = {"xla_enable_async_all_gather": "true", "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true"}

HISTORY = 50  # steps whose norms must be known before one can be a spike


def token_loss(config: Train) -> losses.TokenLoss:
    """Return the loss of each target token that the config asks for."""
    if config.loss == "cross_entropy":
        return partial(losses.cross_entropy, label_smoothing=config.label_smoothing, z_loss=config.z_loss)
    return partial(losses.squared_error, scale=config.squared_error_scale, target=config.squared_error_target)


@dataclass(frozen=True)
class PreparedStep:
    """A run's step and all that it is made from, before any weight is read."""

    optimizer: optax.GradientTransformation
    shapes: TrainState  # of ShapeDtypeStructs
    shardings: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def prepare(
    model: Model, config: Config, mesh: jax.sharding.Mesh, frozen: Params, total_steps: int, warmup: int, decay: int
) -> PreparedStep:
    """Prepare the step of a run of `total` steps; of `frozen`, the weights that stay, only the shapes matter."""
    schedule = make_schedule(config.train.optimizer, total_steps, warmup, decay)
    optimizer = make_optimizer(config.train.optimizer, schedule, model.trained_logical_axes)
    dtype = config.model.param_dtype
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.trained_shapes)
    shapes = jax.eval_shape(partial(start, optimizer=optimizer), params, frozen)
    shardings = state_shardings(model, shapes, mesh)
    step = make_train_step(model, config.train, optimizer, schedule, mesh, shardings)
    return PreparedStep(optimizer, shapes, shardings, step)


def loss_fn(
    model: Model, config: Train, trained: Params, frozen: Params, batch: Any, key: jax.Array | None,
    balance_X: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Return the weighted sum of a micro-batch's token losses, and the sum of the weights.

    A key is for dropout. `balance_X` is what a unit of each expert's router probability costs, if that is balanced.
    """
    params = model.join(trained, frozen)
    states_BTD, routing = model.hidden_states(params, batch, key)
    total, weight = losses.chunked_sum(
        token_loss(config), model.logits, config.loss_chunk, model.head(params), states_BTD, batch.targets_BT,
        batch.weights_BT, head_trained=model.trains_head,
    )  # fmt: skip
    if balance_X is not None:
        assert routing is not None
        total += jnp.dot(balance_X, routing.probabilities_X)
    return total, weight


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
    the same however many micro-batches it is computed in.
    """
    gradient = jax.value_and_grad(partial(loss_fn, model, config), has_aux=True)
    dropout = bool(model.options.dropout or (model.adapter and model.adapter.dropout))
    balance = config.router_aux_loss_coef if model.config.experts else 0.0

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if dropout else None
        # A micro-batch takes every n-th row, so that each device's rows stay where they are.
        number = config.gradient_accumulation_steps
        micro_batches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, number, *x.shape[1:]), 1, 0), batch)
        balance_X = _balance(model, state, batch, micro_batches, balance) if balance else None
        total, weight, gradients = _sum_gradients(gradient, state.params, state.frozen, micro_batches, key, balance_X)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), gradients)
        norm = optax.tree.norm(gradients)
        usable = _is_usable(config, state, norm)
        if config.max_grad_norm:
            scale = jnp.minimum(1, config.max_grad_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_'s constant
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        new = _update(state, optimizer, gradients, norm, usable)
        metrics = {
            "loss": total / jnp.maximum(weight, 1),
            "weight": weight,  # that the loss is a mean over
            "grad_norm": norm,
            "grad_norm_mean": state.norms.mean,
            # The optimizer counts the steps that it takes; its state from a skipped step is discarded.
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }
        return new, metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
    )


def _is_usable(config: Train, state: TrainState, norm: jax.Array) -> jax.Array:
    """Return whether gradients of this norm, before clipping, are finite and not a spike."""
    # Clipping already bounds what lies within `max_grad_norm`, however small the norms have become.
    above_usual = (norm > config.max_spike * state.norms.mean) & (norm > config.max_grad_norm)
    is_spike = (state.norms.count >= HISTORY) & above_usual & (config.max_spike > 0)
    return jnp.isfinite(norm) & ~is_spike


def _update(
    state: TrainState, optimizer: optax.GradientTransformation, gradients: Params, norm: jax.Array, usable: jax.Array
) -> TrainState:
    """Return the state after a step with these gradients, which is skipped if they are not usable."""
    updates, memory = optimizer.update(gradients, state.optimizer, state.params)
    params, memory, norms = jax.tree.map(
        lambda new, old: jnp.where(usable, new, old).astype(old.dtype),  # a float32 update of bfloat16 memory
        (optax.apply_updates(state.params, updates), memory, state.norms.add(norm)),
        (state.params, state.optimizer, state.norms),
    )
    skipped = jnp.where(usable, 0, 1)
    return TrainState(
        step=state.step + 1,
        params=params,
        frozen=state.frozen,
        optimizer=memory,
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        norms=norms,
    )


def _sum_gradients(
    gradient: Callable, params: Params, frozen: Params, micro_batches: Any, key: jax.Array | None,
    balance_X: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Params]:  # fmt: skip
    """Return (loss sum, weight, summed gradients) over all micro-batches, computed one after another."""
    number = jax.tree.leaves(micro_batches)[0].shape[0]
    if number == 1:
        (total, weight), gradients = gradient(
            params, frozen, jax.tree.map(lambda x: x[0], micro_batches), key, balance_X
        )
        return total, weight, gradients

    def add(sums: tuple, xs: tuple) -> tuple[tuple, None]:
        micro_batch, i = xs
        batch_key = None if key is None else jax.random.fold_in(key, i)
        (total, weight), gradients = gradient(params, frozen, micro_batch, batch_key, balance_X)
        return jax.tree.map(jnp.add, sums, (total, weight, gradients)), None

    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, (micro_batches, jnp.arange(number)))[0]


def _balance(model: Model, state: TrainState, batch: Any, micro_batches: Any, coefficient: float) -> jax.Array:
    """Return what a unit of each expert's router probability costs, [X], in units of the summed token loss.

    The balancing loss (Shazeer et al. 2017, Fedus et al. 2021) is X * sum over experts of (share of tokens *
    mean probability), over all tokens and layers of the step, as in Transformers. The shares have no gradient,
    so once they are known it is a sum over tokens. Computing them takes an extra forward pass.
    """
    params = model.join(state.params, state.frozen)

    def add(counts_X: jax.Array, micro_batch: Any) -> tuple[jax.Array, None]:
        _, routing = model.hidden_states(params, micro_batch)
        assert routing is not None
        return counts_X + routing.counts_X, None

    experts = model.config.experts
    assert experts is not None
    counts_X = jax.lax.scan(add, jnp.zeros(experts.number, jnp.float32), micro_batches)[0]
    tokens = jnp.maximum(counts_X.sum() / experts.per_token, 1)  # of all layers
    weight = jnp.maximum(batch.weights_BT.sum(), 1)
    return coefficient * weight * experts.number * counts_X / jnp.square(tokens)
