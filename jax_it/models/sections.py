"""The runs of layers that a stack computes by scans, and how they divide its weights and caches.

Neighbouring layers of one kind are a run. Gemma 3, for example, repeats two runs: five layers with a window, and one
without. Each run of a section is compiled once.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import jax
from flax import nnx

from jax_it.models.config import LayerKind, StackConfig
from jax_it.models.kv_cache import KVCache
from jax_it.models.layer import Layer


class LayerRun(NamedTuple):
    """Neighbouring layers of one kind."""

    kind: LayerKind
    length: int


class Section(NamedTuple):
    """Runs of layers that are repeated. Over all repeats, the layers of a run are a group: they are cached together."""

    repeats: int
    runs: tuple[LayerRun, ...]


def scanned(c: StackConfig) -> tuple[Section, ...]:
    """Return the sections of a stack that is computed by scans: whole periods, and the layers left over."""

    def runs(kinds: tuple[LayerKind, ...]) -> tuple[LayerRun, ...]:
        return tuple(LayerRun(kind, len(list(layers))) for kind, layers in groupby(kinds))

    periods, left_over = divmod(c.num_layers, len(c.layer_kinds))
    rest = (Section(1, runs(c.layer_kinds[:left_over])),) if left_over else ()
    return Section(periods, runs(c.layer_kinds)), *rest


def unrolled(c: StackConfig) -> tuple[Section, ...]:
    """Return the section of a stack in which each layer is a run of its own.

    It compiles more slowly than a scan, which copies a layer's weights whenever it comes to it.
    """
    kinds = c.layer_kinds
    return (Section(1, tuple(LayerRun(kinds[i % len(kinds)], 1) for i in range(c.num_layers))),)


def cut(tree: Any, sections: Sequence[Section]) -> list[Any]:
    """Cut arrays [L, …] into one for each group, [repeats, length, …]."""

    def of_run(x: jax.Array, start: int, repeats: int, length: int, at: slice) -> jax.Array:
        return x[start : start + repeats * length].reshape(repeats, length, *x.shape[1:])[:, at]

    groups, start = [], 0
    for repeats, runs in sections:
        ends = list(accumulate(run.length for run in runs))
        for run, end in zip(runs, ends, strict=True):
            at = slice(end - run.length, end)
            groups.append(jax.tree.map(partial(of_run, start=start, repeats=repeats, length=ends[-1], at=at), tree))
        start += repeats * ends[-1]
    return groups


def group_layers(layers: Layer, sections: Sequence[Section]) -> list[Layer]:
    """Cut the layers [L, …] of a stack into those of each group, [repeats, length, …]."""
    graph, weights = nnx.split(layers)
    return [nnx.merge(graph, group) for group in cut(weights, sections)]


def unstack_layers(cache: KVCache, sections: Sequence[Section]) -> KVCache:
    """Return the cache with a group for each layer, in the order of layers, as an unrolled stack has it."""
    places, first = [], 0  # of each layer: its group and its index there
    for repeats, runs in sections:
        for repeat in range(repeats):
            places += [(g, repeat * run.length + i) for g, run in enumerate(runs, first) for i in range(run.length)]
        first += len(runs)

    def unstack(groups: tuple) -> tuple:
        return tuple(jax.tree.map(lambda x, i=i: x[i][None], groups[group]) for group, i in places)

    return dataclasses.replace(
        cache,
        groups=unstack(cache.groups),
        windows=tuple(cache.windows[group] for group, _ in places),
        source=cache.source and dataclasses.replace(cache.source, groups=unstack(cache.source.groups)),
    )
