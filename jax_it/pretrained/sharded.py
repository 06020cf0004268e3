"""Tensors to sharded params by a weight table, a slice at a time; and back, a layer at a time."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.models import Params
from jax_it.models.quantized import KINDS, Quantized, quantize
from jax_it.models.weights import WeightSpec, flatten, unflatten
from jax_it.pretrained.safetensors import TensorReader


def read_params(
    table: Mapping[str, WeightSpec],
    shapes: Params,
    tensors: TensorReader,
    dtypes: Mapping[str, str],
    mesh: jax.sharding.Mesh,
) -> Params:
    """Return the params of a weight table, each shard cut straight out of the files.

    `shapes` is the params' tree, and `dtypes` names a dtype or a kind of quantization for each path. In addition to
    its shards a host holds one of them and one tensor's part at a time, and reads nothing twice for replicas.
    """
    leaves, params = flatten(shapes), {}
    for path, weight in table.items():
        read = _read_quantized if dtypes[path] in KINDS else _read_array
        params[path] = read(weight, leaves[path].shape, tensors, dtypes[path], mesh)
    return unflatten(params)


def _read_array(
    weight: WeightSpec, shape: tuple[int, ...], tensors: TensorReader, dtype: str, mesh: jax.sharding.Mesh
) -> jax.Array:
    whole = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def make(index: tuple[slice, ...]) -> list[np.ndarray]:
        return [weight.cut(shape, index, tensors.read, whole.dtype)]

    (array,) = _make_shards([whole], weight.logical_axes, mesh, make, by_rows=False)
    return array


def _read_quantized(
    weight: WeightSpec, shape: tuple[int, ...], tensors: TensorReader, kind: str, mesh: jax.sharding.Mesh
) -> Quantized:
    whole = jax.eval_shape(lambda array: quantize(array, kind), jax.ShapeDtypeStruct(shape, jnp.float32))
    stacked = len(weight.stacked)

    def rows(index: tuple[slice, ...]) -> list[np.ndarray]:
        """Return codes and scales of some rows, a tensor's at a time: in float32 these are eight times as large."""
        spans = [range(*i.indices(n)) for i, n in zip(index, shape, strict=False)]
        parts = [np.empty((*map(len, spans), part.shape[-1]), part.dtype) for part in (whole.codes, whole.scales)]
        for position in itertools.product(*(enumerate(span) for span in spans[:stacked])):
            layer = [slice(i, i + 1) for _, i in position]
            made = quantize(weight.cut(shape, (*layer, *index[stacked:], slice(None)), tensors.read), kind)
            for part, new in zip(parts, (made.codes, made.scales), strict=True):
                part[tuple(number for number, _ in position)] = new.reshape(new.shape[stacked:])
        return parts

    codes, scales = _make_shards([whole.codes, whole.scales], weight.logical_axes, mesh, rows, by_rows=True)
    return Quantized(codes, scales, kind)


def _make_shards(
    arrays: Sequence[Any],
    logical_axes: str,
    mesh: jax.sharding.Mesh,
    make: Callable[[tuple[slice, ...]], list[np.ndarray]],
    by_rows: bool,
) -> list[jax.Array]:
    """Make arrays with the same axes one shard after another; `make(index)` gives the part of each at an index.

    `by_rows`: the index lacks the last axis, in which the arrays differ, and the parts are whole along it.
    """
    shardings = [jax.sharding.NamedSharding(mesh, sharding.spec(logical_axes, array.shape, mesh)) for array in arrays]
    indices: list[Any] = [s.addressable_devices_indices_map(a.shape) for s, a in zip(shardings, arrays, strict=True)]
    together: dict[str, list[jax.Device]] = {}  # devices that need the same
    for device, index in indices[0].items():
        together.setdefault(repr(index[:-1] if by_rows else index), []).append(device)
    put: list[dict[jax.Device, jax.Array]] = [{} for _ in arrays]  # on each device, its part of each array
    for devices in together.values():
        first = indices[0][devices[0]]
        for number, part in enumerate(make(first[:-1] if by_rows else first)):
            for device in devices:
                mine = part[..., indices[number][device][-1]] if by_rows else part
                put[number][device] = jax.device_put(mine, device)
            jax.block_until_ready([put[number][device] for device in devices])  # before the next part is made
    return [
        jax.make_array_from_single_device_arrays(array.shape, placed, list(parts.values()))
        for array, placed, parts in zip(arrays, shardings, put, strict=True)
    ]


def gather_tensors(
    table: Mapping[str, WeightSpec], leaves: Mapping[str, Any], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Gather a weight table's arrays, given by path, from all hosts: (name, tensor) pairs, a layer at a time.

    Weights that share a tensor are written into it together.
    """
    together: dict[str, list[str]] = {}
    for path, weight in table.items():
        together.setdefault(weight.name, []).append(path)
    for paths in together.values():
        for index, name in table[paths[0]].tensors(leaves[paths[0]].shape):
            tensor: np.ndarray | None = None
            for path in paths:
                part = gather(leaves[path], index).astype(dtype)
                tensor = table[path].restore(part, tensor)
            assert tensor is not None
            yield name, np.ascontiguousarray(tensor)


def gather(array: Any, index: tuple[int, ...] = ()) -> np.ndarray:
    """Return an array, or an entry of its first axes, on every host; if it is sharded over several, all call this."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(jax.device_get(array[index]))
    placed: Any = array.sharding
    return np.asarray(_gather_program(sharding.replicated(placed.mesh))(array, *index))


@lru_cache
def _gather_program(whole: jax.sharding.NamedSharding) -> Callable[..., jax.Array]:
    """Return a jitted function from (array, *index) to the entry, replicated on every device."""
    return jax.jit(lambda array, *index: array[index], out_shardings=whole)
