"""Training batches by step: the batch of step s is a pure function of the config, the seed and s."""

import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jax_it.config import Duration, Rates
from jax_it.data.encoded import Encoded
from jax_it.data.formats import Batch, Format
from jax_it.data.mixture import Mixture
from jax_it.data.packing import WINDOW, Layout, Rows, Shape

AHEAD = 4  # batches that are made before they are asked for


class Sizes(NamedTuple):
    """What a step trains on, over all hosts: real examples and tokens, and all positions.

    All tokens of a causal model are target tokens, also those that are not trained on.
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


@dataclass(frozen=True)
class Part:
    """Which of a batch's rows a host makes: the `numbers` of `count` equal parts, of rows padded to a multiple."""

    numbers: tuple[int, ...] = (0,)
    count: int = 1
    multiple: int = 1


WHOLE = Part()


class TrainData:
    """The rows of a run, epoch after epoch, cut into steps.

    If `packed`, examples of a window of the stream share rows of the layout's shape, and the rows are shuffled. If not,
    each row is one example, and a batch is padded to its longest; the layout's shape is the limit.
    """

    def __init__(self, mixture: Mixture, format: Format, layout: Layout, packed: bool):
        self.mixture = mixture
        self.layout = layout
        self.packed = packed
        self.format = format
        self._ends = [0]  # the number of rows up to the end of each epoch planned so far
        self._lock = threading.Lock()  # of the above, which the thread of `read` extends as well
        self._plan = lru_cache(maxsize=2)(self._plan_epoch)

    def steps(self, duration: Duration) -> int:
        """Return the number of steps of a run. Epochs count examples: each epoch's last rows are trained on."""
        if duration.unit == "epochs":
            return math.ceil(self._row_after(duration.value) / self.layout.rows)
        return duration.steps(self.rates)

    @property
    def rates(self) -> Rates:
        """Steps per epoch, and mean examples and tokens per step, which turn durations into steps."""
        epoch, steps = self.mixture.epoch(0), self._rows_until(1) / self.layout.rows
        tokens = int(epoch.source_length.sum() + epoch.target_length.sum())
        return Rates(epoch_steps=steps, step_examples=self.mixture.epoch_examples / steps, step_tokens=tokens / steps)

    def read(self, start: int, duration: Duration, part: Part) -> Iterator[Step]:
        """Yield the steps from `start` to the end of the run, made ahead of time by a thread."""
        stop_row = self._row_after(duration.value) if duration.unit == "epochs" else None
        pool = ThreadPoolExecutor(1, "batches")
        try:
            waiting: deque[Future[Step]] = deque()
            for step in range(start, self.steps(duration)):
                waiting.append(pool.submit(self.batch, step, part, stop_row))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def batch(self, step: int, part: Part = WHOLE, stop_row: int | None = None) -> Step:
        """Return the batch of a step; rows from `stop_row` on are empty. Only this part's rows are read."""
        rows = self._examples(step, stop_row)
        multiple = math.lcm(part.multiple, part.count)
        padded = -(-len(rows) // multiple) * multiple
        rows += [[]] * (padded - len(rows))
        sources = np.array([drawn.source_length for row in rows for drawn, _ in row], np.int64)
        targets = np.array([drawn.target_length for row in rows for drawn, _ in row], np.int64)
        shape = self.layout.shape if self.packed else self.format.fit(sources, targets, self.layout.shape)
        sizes = Sizes(
            examples=len(sources),
            source_tokens=int(sources.sum()),
            target_tokens=int(targets.sum()),
            source_positions=padded * shape.blocks * shape.source,
            target_positions=padded * shape.target,
        )
        each = padded // part.count
        mine = [[self._encoded(*one) for one in row] for n in part.numbers for row in rows[n * each : (n + 1) * each]]
        return Step(step, self.format.batch(mine, shape), sizes, shape)

    def examples(self, step: int, duration: Duration) -> list[dict[str, Any]]:
        """Return the examples of a step: [{"source": its name, "records": their numbers, from 1}, ...]."""
        stop_row = self._row_after(duration.value) if duration.unit == "epochs" else None
        found = [drawn for row in self._examples(step, stop_row) for drawn, _ in row]
        return [
            {
                "source": templates[0].name,
                "records": sorted({int(records[d.example]) + 1 for d in found if d.source == i}),
            }
            for i, templates in enumerate(self.mixture.tokenized)
            for records in [templates[0].records]
            if any(d.source == i for d in found)
        ]

    def _examples(self, step: int, stop_row: int | None = None) -> list[list[tuple[Any, int]]]:
        """Return the examples of each row of a step, drawn from the mixture, and the blocks that they are in."""
        first = step * self.layout.rows
        rows = range(first, first + self.layout.rows)
        return [self._examples_of(row) if stop_row is None or row < stop_row else [] for row in rows]

    def _examples_of(self, row: int) -> list[tuple[Any, int]]:
        while self._ends[-1] <= row:
            self._rows_until(len(self._ends))
        epoch = int(np.searchsorted(self._ends, row, side="right")) - 1
        plan, drawn = self._plan(epoch), self.mixture.epoch(epoch)
        return [(drawn[i], block) for i, block in plan.row(row - self._ends[epoch])]

    def _encoded(self, drawn: Any, block: int) -> Encoded:
        """Read the tokens of an example."""
        item = self.mixture.tokenized[drawn.source][drawn.template]
        return item.example(drawn.example)._replace(block=block)

    def _row_after(self, epochs: float) -> int:
        """Return the row at which that many epochs end (at least the first row)."""
        whole = int(epochs)
        before = self._rows_until(whole)
        if epochs > whole:
            before += round((epochs - whole) * (self._rows_until(whole + 1) - before))
        return max(before, 1)

    def _rows_until(self, epochs: int) -> int:
        """Return the number of rows in the first `epochs` epochs."""
        with self._lock:
            while len(self._ends) <= epochs:
                self._ends.append(self._ends[-1] + len(self._plan(len(self._ends) - 1)))
        return self._ends[epochs]

    def _plan_epoch(self, number: int) -> Rows:
        """Return the rows of an epoch, in the order in which they are trained on."""
        drawn = self.mixture.epoch(number)
        total = len(drawn.source)
        if not self.packed:
            return Rows(np.arange(total), np.zeros(total, np.int64), np.arange(total + 1))
        members, blocks, counts = [], [], []
        for start in range(0, total, WINDOW):
            window = drawn[start : start + WINDOW]
            rows = self.format.pack(window["source_length"], window["target_length"], self.layout.shape)
            # The packer sorts rows by their lengths, an order that training must not see.
            for row in self.mixture.shuffled_rows(len(rows), number, start):
                span = slice(rows.ends[row], rows.ends[row + 1])
                members.append(rows.members[span] + start)
                blocks.append(rows.block[span])
                counts.append(len(members[-1]))
        return Rows(np.concatenate(members), np.concatenate(blocks), np.concatenate([[0], np.cumsum(counts)]))
