"""The weight table's line, and how an array with our axes is cut out of Transformers' tensors."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class _Group(NamedTuple):
    """One axis of a tensor: our axes that are merged in it, or fixed entries ("1/3"), and what is beside them."""

    before: int
    axes: tuple[str, ...]
    after: int


class WeightSpec(NamedTuple):
    """One weight: our axes, and Transformers' name and axes for it.

    `WeightSpec("L D N H", "model.layers.{L}.q_proj.weight", "(N H) D")` says that our array [L, D, N, H]
    is a stack over L of the transposes of tensors [N * H, D]. A letter in the name is one that is stacked.
    A weight may be a part of a tensor: "64+(K H)+32 D" has 64 entries of the tensor's first axis before
    it and 32 after it, and in "(N 1/3 H) D" it is the entry 1 of 3 between N and H.
    """

    logical_axes: str
    name: str
    layout: str

    @property
    def stacked(self) -> tuple[str, ...]:
        """The letters of the leading axes over which tensors are stacked."""
        return tuple(letter for letter in self.logical_axes.split() if f"{{{letter}}}" in self.name)

    def tensors(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Return (index into our array, name) of each tensor that the weight is stacked from."""
        sizes = self._sizes(shape)
        for index in itertools.product(*(range(sizes[letter]) for letter in self.stacked)):
            yield index, self._name(index)

    def names(self, shape: Sequence[int]) -> list[str]:
        """Return the tensors that make up the weight, in order."""
        return [name for _, name in self.tensors(shape)]

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of each of those tensors."""
        sizes = self._sizes(shape)
        return tuple(g.before + math.prod(sizes[axis] for axis in g.axes) + g.after for g in self._groups())

    def cut(
        self,
        shape: Sequence[int],
        index: Sequence[slice],
        read: Callable[[str, tuple[slice, ...]], np.ndarray],
        dtype: Any = None,
    ) -> np.ndarray:
        """Return the part `index` of our array; `read(name, slices)` gives a part of one of Transformers' tensors.

        It is new, and of `dtype` where one is given. Of what is read, no more than one tensor's part is held.
        """
        logical_axes, groups = self.logical_axes.split(), self._groups()
        sizes = self._sizes(shape)
        spans = {a: i.indices(n)[:2] for a, i, n in zip(logical_axes, index, shape, strict=True)}
        spans |= {axis: (0, size) for axis, size in sizes.items() if "/" in axis}
        slices = []
        for before, axes, _ in groups:
            # Within a merged axis only the first letter may be cut: the rest lie inside each of its steps.
            step = math.prod(sizes[a] for a in axes[1:])
            if any(spans[a] != (0, sizes[a]) for a in axes[1:]):
                raise ValueError(f"{self.name}: axis {' '.join(axes)} may be cut along {axes[0]} only")
            slices.append(slice(before + spans[axes[0]][0] * step, before + spans[axes[0]][1] * step))
        extent = {axis: stop - start for axis, (start, stop) in spans.items()}
        made = np.empty(0)
        for number, position in enumerate(itertools.product(*(range(*spans[letter]) for letter in self.stacked))):
            part = self._as_ours(read(self._name(position), tuple(slices)), extent)
            if not number:
                made = np.empty([extent[letter] for letter in logical_axes], dtype or part.dtype)
            made.reshape(-1, *part.shape)[number] = part
        return made

    def restore(self, array: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        """Return one of Transformers' tensors from our array without its stacked axes; the inverse of `cut`.

        A weight that shares its tensors is written `into` one that is there already.
        """
        shape = (1,) * len(self.stacked) + array.shape
        tensor = np.empty(self.tensor_shape(shape), array.dtype) if into is None else into
        self.part_of(tensor, array.shape)[...] = array
        return tensor

    def part_of(self, tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return a view with our axes, without the stacked ones, of the weight's part of a tensor."""
        place = tuple(slice(g.before, n - g.after) for g, n in zip(self._groups(), tensor.shape, strict=True))
        return self._as_ours(tensor[place], self._sizes((1,) * len(self.stacked) + tuple(shape)))

    def _as_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        flat = [axis for group in self._groups() for axis in group.axes]
        split = tensor.reshape([sizes[axis] for axis in flat])
        split = split[tuple(int(axis.split("/")[0]) if "/" in axis else slice(None) for axis in flat)]
        flat = [axis for axis in flat if "/" not in axis]
        inner = self.logical_axes.split()[len(self.stacked) :]
        return split.transpose([flat.index(axis) for axis in inner])

    def _name(self, index: Sequence[int]) -> str:
        return self.name.format(**dict(zip(self.stacked, index, strict=True)))

    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        fixed = {axis: int(axis.split("/")[1]) for group in self._groups() for axis in group.axes if "/" in axis}
        return dict(zip(self.logical_axes.split(), shape, strict=True)) | fixed

    def _groups(self) -> list[_Group]:
        groups = []
        for part in split_layout(self.layout):
            found = re.fullmatch(r"(?:(\d+)\+)?(\(.*\)|[A-Z])(?:\+(\d+))?", part)
            assert found, f"{self.layout!r} is not a layout"
            before, merged, after = found.groups()
            groups.append(_Group(int(before or 0), tuple(merged.strip("()").split()), int(after or 0)))
        return groups


def split_layout(layout: str) -> list[str]:
    """Split a layout into a part for each axis of the tensor: "64+(K H)+32 D" into "64+(K H)+32" and "D"."""
    return re.findall(r"(?:\([^)]*\)|\S)+", layout)


def tensor_shapes(weights: Mapping[str, WeightSpec], shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of some weights, whose own shapes are given by path."""
    return {
        name: weight.tensor_shape(shapes[path].shape)
        for path, weight in weights.items()
        for name in weight.names(shapes[path].shape)
    }


def is_matrix(logical_axes: str) -> bool:
    """Return whether a weight is a matrix for each layer: of a linear layer, an expert, an embedding or a head.

    A norm's scale, a bias and a table of relative biases are not: they stay float32, and have neither weight decay nor
    adapters. Heads and their entries count as one axis.
    """
    axes = set(logical_axes.split()) - {"L"}
    return "E" not in axes and len(axes - {"H"} if axes & {"N", "K"} else axes) > 1


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a params tree of nested dicts as {"encoder.norm": leaf}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
