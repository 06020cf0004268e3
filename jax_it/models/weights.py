"""The weight table's line, and how an array with our axes is cut out of Transformers' tensors."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Weight(NamedTuple):
    """One weight: our axes, and Transformers' name and axes for it.

    `Weight("L D N H", "model.layers.{L}.q_proj.weight", "(N H) D")` says that our array [L, D, N, H]
    is a stack over L of the transposes of tensors [N * H, D].
    """

    letters: str
    name: str
    layout: str

    def names(self, shape: Sequence[int]) -> list[str]:
        """The tensors that make up the weight, in order."""
        return [self.name.format(L=i) for i in range(shape[0])] if self.stacked else [self.name]

    @property
    def stacked(self) -> bool:
        return self.letters.startswith("L ")

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each of those tensors."""
        sizes = dict(zip(self.letters.split(), shape, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in self._groups())

    def cut(
        self, shape: Sequence[int], index: Sequence[slice], read: Callable[[str, tuple[slice, ...]], np.ndarray]
    ) -> np.ndarray:
        """The part `index` of our array; `read(name, slices)` gives a part of one of Transformers' tensors."""
        letters = self.letters.split()
        sizes = dict(zip(letters, shape, strict=True))
        spans = {a: i.indices(n)[:2] for a, i, n in zip(letters, index, shape, strict=True)}
        groups = self._groups()
        slices = []
        for group in groups:
            # Within a merged axis only the first letter may be cut: the rest lie inside each of its steps.
            step = math.prod(sizes[a] for a in group[1:])
            if any(spans[a] != (0, sizes[a]) for a in group[1:]):
                raise ValueError(f"{self.name}: axis {' '.join(group)} may be cut along {group[0]} only")
            slices.append(slice(spans[group[0]][0] * step, spans[group[0]][1] * step))
        flat = [a for group in groups for a in group]
        inner = [a for a in letters if a != "L"] if self.stacked else letters
        parts = []
        for i in range(*spans["L"]) if self.stacked else (0,):
            part = read(self.name.format(L=i), tuple(slices))
            part = part.reshape([spans[a][1] - spans[a][0] for a in flat])
            parts.append(part.transpose([flat.index(a) for a in inner]))
        return np.stack(parts) if self.stacked else parts[0]

    def restore(self, array: np.ndarray) -> np.ndarray:
        """One of Transformers' tensors from our array without its axis L; the inverse of `cut`."""
        inner = self.letters.removeprefix("L ").split()
        flat = [a for group in self._groups() for a in group]
        shape = self.tensor_shape(((1,) if self.stacked else ()) + array.shape)
        return np.ascontiguousarray(array.transpose([inner.index(a) for a in flat]).reshape(shape))

    def _groups(self) -> list[list[str]]:
        return [found.strip("()").split() for found in re.findall(r"\([^)]*\)|\w+", self.layout)]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A params tree of nested dicts as {"encoder.norm": leaf}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
