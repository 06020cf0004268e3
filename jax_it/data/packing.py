"""Which examples share a row. Plans are made of lengths alone, so any step's rows can be found without data.

A packed row has G source blocks of `source_length` positions and one target of `target_length`. An
example's source lies whole in one block, so self-attention in the encoder never needs to look beyond a
block and costs what it costs in padded rows, while targets, which are much shorter, share a row of
their own across the blocks: a few long ones are evened out by many short ones.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_TARGET = 2048  # positions, of rows whose target has more than the longest example's for each block
WINDOW = 16384  # examples that are packed together; the memory and the time of a plan are bounded by it


class Shape(NamedTuple):
    """The static shape of a row: `blocks` of `source` positions, and `target` positions.

    A causal model's row has no source: its shape is (0, 0, positions).
    """

    blocks: int
    source: int
    target: int


RowCost = Callable[[Shape], float]  # the time of one row in the step, in any unit


@dataclass(frozen=True)
class Rows:
    """Rows as flat arrays: row r holds `members[ends[r]:ends[r + 1]]`, each in one of its `block`s."""

    members: np.ndarray  # indices of the examples packed
    block: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def row(self, r: int) -> list[tuple[int, int]]:
        """Return (example, block) of each example of a row."""
        span = slice(self.ends[r], self.ends[r + 1])
        return list(zip(self.members[span].tolist(), self.block[span].tolist(), strict=True))


def pack(source_lengths: np.ndarray, target_lengths: np.ndarray, shape: Shape) -> Rows:
    """Pack examples into as few rows as can quickly be found. Every example is in exactly one row.

    Two steps: best-fit decreasing of sources into blocks, then blocks into rows, those with most
    target tokens first, each into the row that has the fewest so far.
    """
    if not len(source_lengths):
        return Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))
    block_of, targets = _fill_blocks(source_lengths, target_lengths, shape)
    row_of_block, position = _group_blocks(targets, shape)
    return _rows(row_of_block[block_of], position[block_of])


def pack_sequences(lengths: np.ndarray, capacity: int) -> Rows:
    """Pack sequences of these lengths into rows of `capacity` positions: best-fit decreasing, in one dimension."""
    row_of = np.zeros(len(lengths), np.int64)
    opened: list[tuple[int, int]] = []  # sorted (free positions, row)
    rows = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect_left(opened, (length, -1))
        if at < len(opened):
            free, row = opened.pop(at)
        else:
            free, row = capacity, rows
            rows += 1
        row_of[i] = row
        if free > length:
            insort(opened, (free - length, row))
    return _rows(row_of, np.zeros_like(row_of))


def _rows(row_of: np.ndarray, block_of: np.ndarray) -> Rows:
    """Return rows in which examples are sorted by block, and within one by their number."""
    members = np.lexsort((np.arange(len(row_of)), block_of, row_of))
    return Rows(members, block_of[members], np.concatenate([[0], np.cumsum(np.bincount(row_of))]))


def _fill_blocks(sources: np.ndarray, targets: np.ndarray, shape: Shape) -> tuple[np.ndarray, list[int]]:
    """Return the block of each example, and each block's target tokens."""
    # What a block may take of the row's target: its share, or one long target and a few short ones.
    capacity = min(
        max(2 * shape.target // shape.blocks, int(targets.max()) + shape.target // (2 * shape.blocks)), shape.target
    )
    block_of = np.zeros(len(sources), np.int64)
    taken: list[int] = []
    # Open blocks as sorted (free source positions, block), one list for each power of 2 of free target positions:
    # the best fit is looked for where the target fits too, and blocks full of targets are not looked at.
    opened: list[list[tuple[int, int]]] = [[] for _ in range(capacity.bit_length() + 1)]
    for i in np.lexsort((-targets, -sources)).tolist():
        source, target = int(sources[i]), int(targets[i])
        best: tuple[int, int, int] | None = None
        for level in range((target - 1).bit_length(), len(opened)):
            blocks = opened[level]
            at = bisect_left(blocks, (source, -1))
            if at < len(blocks) and (best is None or blocks[at][0] < best[0]):
                best = (*blocks[at], level)
        if best is None:
            free, block = shape.source, len(taken)
            taken.append(0)
        else:
            free, block, level = best
            del opened[level][bisect_left(opened[level], (free, block))]
        taken[block] += target
        block_of[i] = block
        if free > source and taken[block] < capacity:
            insort(opened[(capacity - taken[block]).bit_length() - 1], (free - source, block))
    return block_of, taken


def _group_blocks(targets: list[int], shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return each block's row and its position in it."""
    order = np.argsort(-np.asarray(targets), kind="stable").tolist()
    rows = max(math.ceil(len(targets) / shape.blocks), math.ceil(sum(targets) / shape.target))
    heap = [(0, row) for row in range(rows)]  # (target tokens, row), of rows with a free block
    used = [0] * rows
    row_of, position = np.zeros(len(targets), np.int64), np.zeros(len(targets), np.int64)
    for block in order:
        if heap and heap[0][0] + targets[block] <= shape.target:
            total, row = heapq.heappop(heap)
        else:
            total, row = 0, len(used)
            used.append(0)
        row_of[block], position[block] = row, used[row]
        used[row] += 1
        if used[row] < shape.blocks:
            heapq.heappush(heap, (total + targets[block], row))
    return np.unique(row_of, return_inverse=True)[1], position


@dataclass(frozen=True)
class Layout:
    """The shape of rows, packed or not, and how many make a step, with how full they are expected to be."""

    shape: Shape
    rows: int  # in a step
    examples_per_row: float
    source_fill: float  # share of the positions that hold a token; 0 where there are none
    target_fill: float


def choose_layout(
    sources: np.ndarray, targets: np.ndarray, batch_size: int, cost: RowCost, shape: Shape | None, smallest: Shape
) -> Layout:
    """Choose the row lengths that train an example at the least cost, measured by packing a sample.

    `smallest` is the shape of one example's row; `shape` is the user's own choice, if there is one.
    Fill is not the aim: longer rows fill better, but each target token attends to its whole row. Among
    layouts whose step holds `batch_size` examples within 10 %, one is taken whose cost is within 5 % of the
    least, which no estimate can tell apart: that which wastes the fewest target positions.
    """
    if shape is not None:
        return layout_of(pack(sources, targets, shape), sources, targets, batch_size, shape)
    layouts = [
        layout_of(pack(sources, targets, tried), sources, targets, batch_size, tried)
        for tried in _candidates(sources, targets, smallest)
    ]

    def off_target(layout: Layout) -> float:
        return abs(layout.rows * layout.examples_per_row / batch_size - 1)

    nearest = min(off_target(layout) for layout in layouts)
    right = [layout for layout in layouts if off_target(layout) <= max(nearest, 0.1)]
    least = min(cost(layout.shape) / layout.examples_per_row for layout in right)
    cheap = [layout for layout in right if cost(layout.shape) / layout.examples_per_row <= 1.05 * least]
    return max(cheap, key=lambda layout: layout.target_fill)


def _candidates(sources: np.ndarray, targets: np.ndarray, smallest: Shape) -> Iterator[Shape]:
    """Yield the shapes of rows to try: for each number of blocks, targets about as long as full blocks need."""
    for blocks in (1, 2, 3, 4, 6, 8):
        most, mean = blocks * smallest.target, 0.0
        while True:
            rows = pack(sources, targets, Shape(blocks, smallest.source, most))
            before, mean = mean, float(targets.sum()) / max(len(rows), 1)
            if mean < 1.1 * before:
                break  # the blocks are full
            first = max(_round_up(mean, 8), smallest.target)
            last = max(_round_up(1.5 * mean, 8), first)
            for length in range(first, last + 1, _round_up(first / 32, 8)):
                yield Shape(blocks, smallest.source, length)
            most *= 2  # where sources are short, a block has room for those of several long targets
            if most > MAX_TARGET:
                break


def layout_of(rows: Rows, sources: np.ndarray, targets: np.ndarray, batch_size: int, shape: Shape) -> Layout:
    """Return the layout of `batch_size` examples in rows that are packed as this sample is."""
    per_row = len(sources) / len(rows)
    return Layout(
        shape=shape,
        rows=_round_rows(batch_size / per_row),
        examples_per_row=per_row,
        source_fill=float(sources.sum()) / max(len(rows) * shape.blocks * shape.source, 1),
        target_fill=float(targets.sum()) / (len(rows) * shape.target),
    )


def _round_rows(rows: float) -> int:
    """Round `rows` to a multiple of 8 (of 1, 2 or 4 where there are few; of more where there are many).

    So devices and micro-batches, on whose numbers a batch must not depend, can share them evenly.
    """
    digits = int(math.log2(max(rows, 1)))
    unit = 2 ** max(min(digits, 3), digits - 2)
    return max(round(rows / unit) * unit, 1)


def round_rows_closely(rows: float) -> int:
    """Round `rows` to a multiple of the greatest power of 2 that stays within a tenth of it, and at least 1.

    For rows of a given length, whose shape cannot make up for a number that is rounded more.
    """
    number = max(round(rows), 1)
    for power in range(int(math.log2(number)) + 1):
        rounded = round(rows / 2**power) * 2**power
        if abs(rounded - rows) <= 0.1 * rows:
            number = rounded
    return number


def bucket(length: int, limit: int) -> int:
    """Return the smallest of 16, 24, 32, 48, 64, 96, … that holds `length`, at most `limit`: few compiled shapes."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, limit)


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
