"""The endless, ordered stream of examples that a run draws from its data sets, readable at any position."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jax_it.config import Data, Source
from jax_it.data.tokenized import Tokenized, eligible
from jax_it.errors import UserError

COLUMNS = [  # of an example drawn from the stream; lengths are in tokens, including special tokens
    ("source", np.int32),  # which data set: an index of config.data.train
    ("example", np.int64),  # which of its examples
    ("template", np.int32),  # which of its templates
    ("source_length", np.int32),  # of the encoder's input
    ("target_length", np.int32),  # of the decoder's output, or of a causal model's whole sequence
]


class Mixture:
    """Sources mixed by rate, each shuffled again in each of its own epochs.

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

    def _draw_epoch(self, number: int) -> np.recarray:
        """Draw all examples of an epoch, in order: a pure function of the config, the seed and the number."""
        drawn = np.concatenate([self._draw_source(i, number) for i in range(len(self._pools))])
        order = np.argsort(_hash(self._seed, np.arange(len(drawn)), number, 1), kind="stable")
        return drawn[order].view(np.recarray)

    def shuffled_rows(self, rows: int, epoch: int, start: int) -> np.ndarray:
        """Return an order of the rows that were packed from the examples of an epoch from `start` on."""
        return np.argsort(_hash(self._seed, np.arange(start, start + rows), epoch, 0), kind="stable")

    def _draw_source(self, i: int, number: int) -> np.ndarray:
        """Draw a source's share of an epoch, in the source's own shuffled order."""
        pool, count = self._pools[i], int(self._counts[i])
        position = np.arange(number * count, (number + 1) * count)
        epoch = position // len(pool)
        drawn = np.zeros(count, COLUMNS)
        drawn["source"] = i
        for e in np.unique(epoch):
            here = epoch == e
            # The source's number gives two copies of one data set different orders.
            shuffled = pool[np.argsort(_hash(self._seed, pool, int(e), 2 + i), kind="stable")]
            drawn["example"][here] = shuffled[position[here] % len(pool)]
        # Of the templates that kept the example, one by hash.
        chances = _hash(self._seed, drawn["example"], epoch, -1)
        lengths = [item.target_lengths[drawn["example"]] for item in self.tokenized[i]]
        kept = np.stack(lengths) > 0
        wanted, before = chances % kept.sum(0, dtype=np.uint64), np.zeros(count, np.uint64)
        for j, item in enumerate(self.tokenized[i]):
            here = kept[j] & (before == wanted)
            before += kept[j]
            drawn["template"][here] = j
            drawn["source_length"][here] = item.source_lengths[drawn["example"][here]]
            drawn["target_length"][here] = lengths[j][here]
        return drawn


def mix(
    sources: Sequence[Source],
    tokenized: Sequence[Sequence[Tokenized]],
    data: Data,
    held_out: Sequence[np.ndarray] | None = None,
) -> Mixture:
    """Return the mixture of sources that the config asks for, without the records that are held out."""
    pools = [eligible(templates) for templates in tokenized]
    if held_out is not None:
        pools = [
            pool[~np.isin(templates[0].records[pool], held)]
            for pool, templates, held in zip(pools, tokenized, held_out, strict=True)
        ]
    for source, pool in zip(sources, pools, strict=True):
        if not len(pool):
            raise UserError(
                f"data set {source.path}: no example is left for training; lower config.data.validation_size"
            )
    sizes = np.array([len(pool) for pool in pools])
    if data.mixing == "all":
        return Mixture(tokenized, pools, sizes, data.seed)
    caps = np.array([source.mixing_cap or data.mixing_cap for source in sources])
    capped = np.where(caps > 0, np.minimum(sizes, caps), sizes)
    if data.mixing == "weights":
        rates = np.array([source.weight for source in sources])
    else:
        rates = (capped / capped.max()) ** (1 / data.mixing_temperature)
    counts = _apportion(rates / rates.sum(), int(capped.sum()))
    for source, rate, count in zip(sources, rates, counts, strict=True):
        if rate and not count:
            raise UserError(
                f"data set {source.path}: its weight gives it less than one of {counts.sum()} examples; raise the "
                "weight, or remove the data set"
            )
    return Mixture(tokenized, pools, counts, data.seed)


def hold_out(tokenized: Sequence[Tokenized], number: int, seed: int) -> np.ndarray:
    """Choose `number` of a source's records by hash, independently of the rest of the config."""
    records = np.unique(tokenized[0].records[eligible(tokenized)])
    order = np.argsort(_hash(seed, records, 0, -2), kind="stable")
    return np.sort(records[order[:number]])


def _apportion(rates: np.ndarray, total: int) -> np.ndarray:
    """Split `total` into whole numbers as near to the rates as possible (largest remainders)."""
    exact = np.round(rates * total, 9)  # so that ties go to the first, whatever the last digits
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(np.round(counts - exact, 9), kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def _hash(seed: int, values: np.ndarray, epoch: int | np.ndarray, purpose: int) -> np.ndarray:
    """Return a well-mixed uint64 for each value, by splitmix64: the same in every version of every library."""
    mixed = np.full(len(values), seed % 2**64, np.uint64)
    with np.errstate(over="ignore"):
        for part in (purpose, epoch, values):
            part = np.broadcast_to(np.asarray(part, np.int64), len(values)).view(np.uint64)
            mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
