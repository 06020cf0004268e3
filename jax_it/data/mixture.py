"""The endless, ordered stream of examples that a run draws from its sources, readable at any place."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jax_it.config import Data, Source
from jax_it.data.tokenized import Tokenized, eligible
from jax_it.errors import UserError


class Drawn(NamedTuple):
    """Examples of the stream, as arrays of one length."""

    source: np.ndarray  # which source
    example: np.ndarray  # which of its examples
    template: np.ndarray  # under which of its templates
    source_length: np.ndarray  # tokens, end marks included
    target_length: np.ndarray

    def part(self, start: int, stop: int) -> "Drawn":
        return Drawn(*(array[start:stop] for array in self))


class Mixture:
    """Sources mixed by rate, each shuffled anew in each of its own epochs.

    An epoch of the mixture takes `counts[i]` examples from source i, in an order of its own, and continues
    where the last epoch left that source. With mixing="all" that is every example once.
    """

    def __init__(
        self, tokenized: Sequence[Sequence[Tokenized]], pools: Sequence[np.ndarray], counts: np.ndarray, seed: int
    ):
        self.tokenized = tokenized  # by source, by template
        self.epoch_examples = int(counts.sum())
        self._pools = pools  # by source: the examples that may be drawn
        self._counts = counts
        self._seed = seed
        self.epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, number: int) -> Drawn:
        """All examples of an epoch, in order: a pure function of the config, the seed and the number."""
        parts = [self._draw_source(i, number) for i in range(len(self._pools))]
        source, example, template = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(_hash(self._seed, np.arange(len(source)), number, 1), kind="stable")
        source_length, target_length = self._lengths(source, example, template)
        return Drawn(*(array[order] for array in (source, example, template, source_length, target_length)))

    def shuffled_rows(self, rows: int, epoch: int, start: int) -> np.ndarray:
        """An order of the rows that were packed from the examples of an epoch from `start` on."""
        return np.argsort(_hash(self._seed, np.arange(start, start + rows), epoch, 0), kind="stable")

    def _draw_source(self, i: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A source's share of an epoch: (source, example, template) in the source's own shuffled order."""
        pool, count = self._pools[i], int(self._counts[i])
        place = np.arange(number * count, (number + 1) * count)
        epoch = place // len(pool)
        example = np.zeros(count, np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            # The source's number keeps two copies of one data set from marching in step.
            shuffled = pool[np.argsort(_hash(self._seed, pool, int(e), 2 + i), kind="stable")]
            example[here] = shuffled[place[here] % len(pool)]
        templates = len(self.tokenized[i])
        template = (_hash(self._seed, example, epoch, -1) % np.uint64(templates)).astype(np.int64)
        return np.full(count, i), example, template

    def _lengths(self, source: np.ndarray, example: np.ndarray, template: np.ndarray) -> np.ndarray:
        found = np.zeros((2, len(source)), np.int64)
        for i, templates in enumerate(self.tokenized):
            for j, item in enumerate(templates):
                here = (source == i) & (template == j)
                found[0, here] = item.source_lengths[example[here]]
                found[1, here] = item.target_lengths[example[here]]
        return found


def mix(
    sources: Sequence[Source],
    tokenized: Sequence[Sequence[Tokenized]],
    data: Data,
    held_out: Sequence[np.ndarray] | None = None,
) -> Mixture:
    """The mixture of sources that the config asks for, without the examples that are held out."""
    pools = [eligible(templates) for templates in tokenized]
    if held_out is not None:
        pools = [np.setdiff1d(pool, held, assume_unique=True) for pool, held in zip(pools, held_out, strict=True)]
    for source, pool in zip(sources, pools, strict=True):
        if not len(pool):
            raise UserError(
                f"data set {source.path}: no example is left for training; lower config.data.validation_size"
            )
    sizes = np.array([len(pool) for pool in pools])
    if data.mixing == "all":
        return Mixture(tokenized, pools, sizes, data.seed)
    capped = np.minimum(sizes, data.mixing_cap) if data.mixing_cap else sizes
    if data.mixing == "weights":
        rates = np.array([source.weight for source in sources])
    else:
        rates = (capped / capped.max()) ** (1 / data.mixing_temperature)
    counts = _apportion(rates / rates.sum(), int(capped.sum()))
    for source, rate, count in zip(sources, rates, counts, strict=True):
        if rate and not count:
            raise UserError(
                f"data set {source.path}: its share of the mixture is less than one of {counts.sum()} examples; "
                "raise it, or remove the data set"
            )
    return Mixture(tokenized, pools, counts, data.seed)


def hold_out(tokenized: Sequence[Tokenized], number: int, seed: int) -> np.ndarray:
    """So many of a source's examples, chosen by hash: which ones does not depend on the rest of the config."""
    indices = eligible(tokenized)
    order = np.argsort(_hash(seed, indices, 0, -2), kind="stable")
    return np.sort(indices[order[:number]])


def _apportion(rates: np.ndarray, total: int) -> np.ndarray:
    """`total` split into whole numbers as near to the rates as can be (largest remainders)."""
    exact = np.round(rates * total, 9)  # ties go to the first, however the last digits came out
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(np.round(counts - exact, 9), kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def _hash(seed: int, values: np.ndarray, epoch: int | np.ndarray, purpose: int) -> np.ndarray:
    """A well-mixed uint64 for each value, by splitmix64: the same in every version of every library."""
    mixed = np.full(len(values), seed % 2**64, np.uint64)
    with np.errstate(over="ignore"):
        for part in (purpose, epoch, values):
            part = np.broadcast_to(np.asarray(part, np.int64), len(values)).view(np.uint64)
            mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
