"""The mesh, and the one table from axis letters to mesh axes.

Every other file says which letters an array's axes have (`models/layers.py` declares them); this one
says over which devices they are split.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_it.config import Mesh as MeshConfig
from jax_it.errors import UserError

WHOLE = 4_000_000_000  # bytes of float32 weights that any device has room for, beside what it works on
AXES = ("data", "fsdp", "context", "tensor")

# An axis of the mesh splits at most one axis of an array, the leftmost that asks for it: `D` is split
# over fsdp in a weight ("D F") and whole in an activation ("B T D"), whose batch took fsdp before.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "D": ("fsdp",),
    "F": ("tensor",),
    "K": ("tensor",),
    "N": ("tensor",),
    "V": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh; a size of -1 takes what is left. Raises UserError where the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % given or (not free and given != len(devices)):
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"
        raise UserError(
            f"config.mesh: {text} does not fit {len(devices)} device(s); "
            f"sizes must multiply to {len(devices)}, or divide it with one axis at -1"
        )
    for axis in free:
        sizes[axis] = len(devices) // given
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=list(devices))


def whole_or_split(parameters: int) -> MeshConfig:
    """The mesh to score and generate on: a small model whole on every device, a large one split over them."""
    return MeshConfig() if parameters * 4 <= WHOLE else MeshConfig(data=1, fsdp=-1)


def spec(letters: str, shape: Sequence[int], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """How an array with these axis letters ("L D N H") is split. An axis that does not divide stays whole."""
    names = letters.split()
    if len(names) != len(shape):
        raise ValueError(f"{letters!r} does not name the axes of shape {tuple(shape)}")
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


def shardings(letters: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedShardings for a tree of letters and one of arrays (or their shapes and dtypes).

    Where a weight is several arrays, as a quantised one, all of them have its letters.
    """

    def place(names: str, weight: Any) -> Any:
        return jax.tree.map(lambda array: NamedSharding(mesh, spec(names, array.shape, mesh)), weight)

    return jax.tree.map(place, letters, shapes)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of every array of a batch: rows over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["B"]))


def batch_parts(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["B"])


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x` split as its letters say over the mesh of `jax.set_mesh`; as it is where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, x.shape, mesh))
