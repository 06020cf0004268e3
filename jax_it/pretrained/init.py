"""Params that are drawn at random, each made in its shards: of a model without a folder, and fresh adapters."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jax_it import sharding
from jax_it.models import Model, Params
from jax_it.models.weights import flatten, unflatten
from jax_it.pretrained.storage import cast_or_quantize

_GROUP_SIZE = 64_000_000  # values; each program takes a second or more to trace and compile


def init_base(model: Model, dtypes: Mapping[str, str], mesh: jax.sharding.Mesh, seed: int) -> Params:
    """Draw random base weights, in the dtypes that `storage_dtypes` gives."""
    params: dict[str, Any] = {}
    for paths in _groups(flatten(model.shapes)):

        def init(key: jax.Array, paths: tuple[str, ...] = paths) -> Params:
            weights = flatten(model.init(key))  # those not in the group are never computed
            return cast_or_quantize(unflatten({path: weights[path] for path in paths}), dtypes)

        shapes = jax.eval_shape(init, jax.random.key(0))
        logical_axes = unflatten({path: model.weights[path].logical_axes for path in paths})
        jitted = jax.jit(init, out_shardings=sharding.shardings(logical_axes, shapes, mesh))
        params |= flatten(jax.block_until_ready(jitted(jax.random.key(seed))))
    return unflatten({path: params[path] for path in model.weights})


def _groups(shapes: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Return the paths to initialize together: all of a small model, and each large weight in a program of its own.

    XLA may work on all weights of a program at once, and holds several times what it returns.
    """
    group: list[str] = []
    size = 0
    for path, shape in shapes.items():
        if group and size + shape.size > _GROUP_SIZE:
            yield tuple(group)
            group, size = [], 0
        group.append(path)
        size += shape.size
    yield tuple(group)


def init_adapter(model: Model, base: Params, mesh: jax.sharding.Mesh, seed: int, dtype: Any) -> Params:
    """Draw adapters that change nothing yet."""

    def init(key: jax.Array, base: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init_adapter(key, base))

    placed = sharding.shardings(model.trained_logical_axes, model.trained_shapes, mesh)
    return jax.jit(init, out_shardings=placed)(jax.random.key(seed), base)
