"""Training batches by step: the batch of step s is a pure function of the config, the seed and s."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import grain
import numpy as np

from jax_it.config import Duration, Rates
from jax_it.data.batches import Placed
from jax_it.data.formats import Batch, Format
from jax_it.data.mixture import Mixture
from jax_it.data.packing import WINDOW, Layout, Rows, Shape


class Sizes(NamedTuple):
    """What a step trains on, over all hosts: real examples and tokens, and all positions.

    All tokens of a causal model are target tokens, those that are not learnt as well.
    """

    examples: int
    source_tokens: int
    target_tokens: int
    source_positions: int
    target_positions: int

    @property
    def tokens(self) -> int:
        return self.source_tokens + self.target_tokens


class Step(NamedTuple):
    step: int
    batch: Batch  # this host's rows
    sizes: Sizes
    shape: Shape


class Member(NamedTuple):
    """An example of a row: where it is from, how long it is, and the block of the row that its source goes to."""

    source: int
    example: int
    template: int
    source_length: int
    target_length: int
    block: int


@dataclass(frozen=True)
class Part:
    """Which of a batch's rows a host makes: the `numbers` of `count` equal parts, of rows padded to a multiple."""

    numbers: tuple[int, ...] = (0,)
    count: int = 1
    multiple: int = 1


WHOLE = Part()


class TrainData:
    """The rows of a run, epoch after epoch, cut into steps.

    With a packed `layout` the examples of a window of the stream share rows, and the rows are
    shuffled; without one each row is an example, and a batch is padded to its longest.
    """

    def __init__(self, mixture: Mixture, format: Format, layout: Layout, packed: bool):
        self.mixture = mixture
        self.layout = layout
        self.packed = packed
        self.format = format
        self._ends = [0]  # after each epoch planned so far: how many rows there are up to there
        self._plan = lru_cache(maxsize=2)(self._plan_epoch)

    def steps(self, duration: Duration) -> int:
        """How many steps a run of this duration has. Epochs count examples: each epoch's last rows are trained on."""
        if duration.unit == "epochs":
            return math.ceil(self._row_after(duration.value) / self.layout.rows)
        return duration.steps(self.rates)

    @property
    def rates(self) -> Rates:
        """Steps per epoch, and mean examples and tokens per step, for turning durations into steps."""
        epoch, steps = self.mixture.epoch(0), self._rows_until(1) / self.layout.rows
        tokens = int(epoch.source_length.sum() + epoch.target_length.sum())
        return Rates(epoch_steps=steps, step_examples=self.mixture.epoch_examples / steps, step_tokens=tokens / steps)

    def read(self, start: int, duration: Duration, part: Part) -> Iterator[Step]:
        """The steps from `start` to the end of the run, made ahead of time by a thread."""
        stop_row = self._row_after(duration.value) if duration.unit == "epochs" else None
        steps = grain.MapDataset.range(start, self.steps(duration)).map(lambda step: self.batch(step, part, stop_row))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def batch(self, step: int, part: Part = WHOLE, stop_row: int | None = None) -> Step:
        """The batch of a step; rows from `stop_row` on are empty. Only this part's rows are read."""
        rows = self._members(step, stop_row)
        multiple = math.lcm(part.multiple, part.count)
        padded = -(-len(rows) // multiple) * multiple
        rows += [[]] * (padded - len(rows))
        everyone = [member for row in rows for member in row]
        shape = self.layout.shape if self.packed else self.format.fit(everyone, self.layout.shape)
        sizes = Sizes(
            examples=len(everyone),
            source_tokens=sum(member.source_length for member in everyone),
            target_tokens=sum(member.target_length for member in everyone),
            source_positions=padded * shape.blocks * shape.source,
            target_positions=padded * shape.target,
        )
        each = padded // part.count
        mine = [[self._placed(m) for m in row] for n in part.numbers for row in rows[n * each : (n + 1) * each]]
        return Step(step, self.format.batch(mine, shape), sizes, shape)

    def examples(self, step: int, duration: Duration) -> list[dict[str, Any]]:
        """Where the examples of a step are from: [{"source": its name, "records": their numbers, from 1}, ...]."""
        stop_row = self._row_after(duration.value) if duration.unit == "epochs" else None
        members = [member for row in self._members(step, stop_row) for member in row]
        return [
            {"source": templates[0].name, "records": sorted({m.example + 1 for m in members if m.source == i})}
            for i, templates in enumerate(self.mixture.tokenized)
            if any(m.source == i for m in members)
        ]

    def _members(self, step: int, stop_row: int | None = None) -> list[list[Member]]:
        """Which examples each row of a step has."""
        first = step * self.layout.rows
        rows = range(first, first + self.layout.rows)
        return [self._members_of(row) if stop_row is None or row < stop_row else [] for row in rows]

    def _members_of(self, row: int) -> list[Member]:
        while self._ends[-1] <= row:
            self._rows_until(len(self._ends))
        epoch = int(np.searchsorted(self._ends, row, side="right")) - 1
        plan, drawn = self._plan(epoch), self.mixture.epoch(epoch)
        return [
            Member._make([*(int(column[at]) for column in drawn), block])
            for at, block in plan.row(row - self._ends[epoch])
        ]

    def _placed(self, member: Member) -> Placed:
        """The tokens of an example, which are read now."""
        example = self.mixture.tokenized[member.source][member.template].example(member.example)
        return Placed(example.source, example.target, member.block, example.learnt)

    def _row_after(self, epochs: float) -> int:
        """Return the row at which that many epochs end (at least the first row)."""
        whole = int(epochs)
        before = self._rows_until(whole)
        if epochs > whole:
            before += round((epochs - whole) * (self._rows_until(whole + 1) - before))
        return max(before, 1)

    def _rows_until(self, epochs: int) -> int:
        """How many rows the first `epochs` epochs have."""
        while len(self._ends) <= epochs:
            self._ends.append(self._ends[-1] + len(self._plan(len(self._ends) - 1)))
        return self._ends[epochs]

    def _plan_epoch(self, number: int) -> Rows:
        """The rows of an epoch, in the order in which they are trained on."""
        drawn = self.mixture.epoch(number)
        total = len(drawn.source)
        if not self.packed:
            return Rows(np.arange(total), np.zeros(total, np.int64), np.arange(total + 1))
        members, blocks, counts = [], [], []
        for start in range(0, total, WINDOW):
            window = drawn.part(start, start + WINDOW)
            rows = self.format.pack(window.source_length, window.target_length, self.layout.shape)
            # Rows come out of the packer sorted by what they hold; training must not see that order.
            for row in self.mixture.shuffled_rows(len(rows), number, start):
                span = slice(rows.ends[row], rows.ends[row + 1])
                members.append(rows.members[span] + start)
                blocks.append(rows.block[span])
                counts.append(len(members[-1]))
        return Rows(np.concatenate(members), np.concatenate(blocks), np.concatenate([[0], np.cumsum(counts)]))
