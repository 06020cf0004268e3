"""The mesh, and the one table from logical axes to mesh axes.

Every other file says what an array's logical axes are (`models/config.py` declares their letters); this one
says over which devices they are split.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_it.config import Mesh as MeshConfig
from jax_it.errors import UserError

WHOLE_MODEL = 4_000_000_000  # bytes of float32 weights that fit on any device beside what it works on
AXES = ("data", "fsdp", "expert", "context", "tensor")  # the last lies on the nearest neighbors

# An axis of the mesh splits at most one axis of an array, the leftmost that asks for it: `D` is split
# over fsdp in a weight ("D F") and whole in an activation ("B T D"), whose batch took fsdp before. Queries
# are split over context by their `T`; the keys that all of them read, `S`, are whole.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "D": ("fsdp", "expert"),
    "X": ("expert",),
    "F": ("tensor",),
    "K": ("tensor",),
    "N": ("tensor",),
    "V": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Make the mesh of the devices, each slice's neighbors beside each other. A size of -1 takes what is left.

    Raises UserError where the sizes do not fit the devices, or the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % given or (not free and given != len(devices)):
        raise UserError(
            f"config.mesh: {_text(sizes) or 'data=1'} does not fit {len(devices)} device(s); "
            f"{' or '.join(_fitting(sizes, len(devices)))} would"
        )
    for axis in free:
        sizes[axis] = len(devices) // given
    slices = _slices(config.slices, devices)
    across = sizes[config.across_slices]
    if across % len(slices):
        raise UserError(
            f"config.mesh.{config.across_slices}: {across} devices cannot be divided evenly among {len(slices)} "
            f"slices; make it a multiple of {len(slices)}, or set config.mesh.across_slices to an axis that is"
        )
    # As mesh_utils.create_hybrid_device_mesh, which does not take the slices of devices that do not tell theirs (CPUs).
    inner = sizes | {config.across_slices: across // len(slices)}
    parts = [
        mesh_utils.create_device_mesh(tuple(inner.values()), each, allow_split_physical_axes=True) for each in slices
    ]
    together = np.concatenate(parts, axis=AXES.index(config.across_slices))
    return jax.sharding.Mesh(together, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _text(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))


def _fitting(sizes: Mapping[str, int], devices: int) -> list[str]:
    """Find sizes near to these that fit: another one along one axis, or else the largest divisors."""
    sizes = {axis: max(size, 1) for axis, size in sizes.items()}
    near = []
    for axis, size in sizes.items():
        if devices % (rest := math.prod(sizes.values()) // size) == 0:
            near.append(_text(sizes | {axis: devices // rest}) or "data=1")
    if not near:
        left = devices
        for axis in reversed(AXES):
            sizes[axis] = left if axis == AXES[0] else math.gcd(sizes[axis], left)
            left //= sizes[axis]
        near.append(_text(sizes))
    return near


def _slices(number: int, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Return the devices slice by slice; where they do not tell theirs, `number` equal parts of their order."""
    told = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(told) > 1:
        if number not in (0, len(told)):
            raise UserError(f"config.mesh.slices: {number}, but the devices form {len(told)} slices; leave it at 0")
        return [[device for device in devices if getattr(device, "slice_index", 0) == index] for index in told]
    number = number or 1
    if len(devices) % number:
        raise UserError(f"config.mesh.slices: {len(devices)} devices cannot be divided evenly among {number} slices")
    each = len(devices) // number
    return [list(devices[i * each : (i + 1) * each]) for i in range(number)]


def inference_mesh(parameters: int, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Make a mesh of all devices to score and generate on: a small model whole on each, a large one split over them."""
    return make_mesh(MeshConfig() if parameters * 4 <= WHOLE_MODEL else MeshConfig(data=1, fsdp=-1), devices)


def spec(logical_axes: str, shape: Sequence[int], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """Return how an array with these logical axes ("L D N H") is split. An axis that does not divide stays whole."""
    names = logical_axes.split()
    if len(names) != len(shape):
        raise ValueError(f"{logical_axes!r} does not name the axes of shape {tuple(shape)}")
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        axes: tuple[str, ...] = ()
        for axis in RULES.get(name, ()):
            parts = math.prod(mesh.shape[a] for a in axes) * mesh.shape[axis]
            if mesh.shape[axis] > 1 and axis not in taken and size % parts == 0:
                axes += (axis,)
        taken.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def shardings(logical_axes: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return a tree of NamedShardings for a tree of logical axes and one of arrays (or their shapes and dtypes).

    Where a weight is several arrays, as a quantized one, all of them have its axes.
    """

    def place(names: str, weight: Any) -> Any:
        return jax.tree.map(lambda array: NamedSharding(mesh, spec(names, array.shape, mesh)), weight)

    return jax.tree.map(place, logical_axes, shapes)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of a batch's arrays: rows over the axes of `B`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["B"]))


def batch_parts(mesh: jax.sharding.Mesh) -> int:
    """Return into how many parts a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["B"])


def round_up_to_shards(rows: int, mesh: jax.sharding.Mesh) -> int:
    """Round a number of rows up to one that the devices share equally."""
    parts = batch_parts(mesh)
    return -(-rows // parts) * parts


def local_parts(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """Return which parts of a batch this process's devices hold; processes that share a row's devices hold the same."""
    by_part = mesh.devices.reshape(batch_parts(mesh), -1)  # B's axes are the mesh's first
    return tuple(i for i, part in enumerate(by_part) if any(d.process_index == jax.process_index() for d in part))


def place(batch: Any, mesh: jax.sharding.Mesh, parts: Sequence[int] | None = None) -> Any:
    """Make the global arrays of a batch, of which each process has the rows of some `parts`, in order, or all."""
    held = range(batch_parts(mesh)) if parts is None else parts
    placement = batch_sharding(mesh)

    def one(array: Any) -> jax.Array:
        each = len(array) // len(held)

        def rows(index: tuple[slice, ...] | None) -> Any:
            assert index
            at = held.index((index[0].start or 0) // each) * each
            return array[at : at + each]

        return jax.make_array_from_callback((each * batch_parts(mesh), *array.shape[1:]), placement, rows)

    return jax.tree.map(one, batch)


def constrain(x: jax.Array, logical_axes: str) -> jax.Array:
    """Split `x` over the mesh of `jax.set_mesh` as its logical axes say; without a mesh, return it as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes, x.shape, mesh))


def parts_of(letter: str) -> int:
    """Return over how many devices of the mesh of `jax.set_mesh` an axis may be split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES.get(letter, ()))


def mesh_size() -> int:
    """Return the number of devices in the mesh of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size
