"""The state of training: the weights, the optimizer's state and a few counters."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_it import sharding
from jax_it.models import Model, Params
from jax_it.models.weights import flatten

DECAY = 0.99  # a mean over about the last 100 steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Norms:
    """An exponential mean of the gradient norms of steps that were not skipped."""

    sum: jax.Array  # of norms, each weighing DECAY times what the one after it weighs
    count: jax.Array  # of norms, int32

    @property
    def mean(self) -> jax.Array:
        """The mean, unbiased from the first norm on, as in Adam (Kingma & Ba 2015); 0 if there is none."""
        weight = (1 - DECAY ** self.count.astype(jnp.float32)) / (1 - DECAY)
        return self.sum / jnp.maximum(weight, 1)

    def add(self, norm: jax.Array) -> "Norms":
        return Norms(DECAY * self.sum + norm, self.count + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: jax.Array  # steps done, int32
    params: Params  # what is trained
    frozen: Params  # the rest of the model's, as it was at the start
    optimizer: Any
    skipped: jax.Array  # steps left out for a gradient that is not finite or spikes, int32
    skipped_in_a_row: jax.Array
    norms: Norms


def start(params: Params, frozen: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step. Each counter is an array of its own, since each is donated."""
    norms = Norms(jnp.float32(0), jnp.int32(0))
    return TrainState(jnp.int32(0), params, frozen, optimizer.init(params), jnp.int32(0), jnp.int32(0), norms)


def state_shardings(model: Model, state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the shardings of a state (or of its shapes): an optimizer array shaped like a weight has that weight's.

    What is left, such as Adafactor's rows and columns, is small and whole on every device.
    """
    shapes = flatten(model.trained_shapes)
    logical_axes = flatten(model.trained_logical_axes)

    def place(path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        weight = ".".join(names)
        if weight in shapes and shapes[weight].shape == leaf.shape:
            return jax.sharding.NamedSharding(mesh, sharding.spec(logical_axes[weight], leaf.shape, mesh))
        return sharding.replicated(mesh)

    frozen = sharding.shardings(model.logical_axes, state.frozen, mesh) if state.frozen else {}
    placed = jax.tree_util.tree_map_with_path(place, dataclasses.replace(state, frozen={}))
    return dataclasses.replace(placed, frozen=frozen)
