"""What a training or evaluation step takes: arrays of static shapes, made by numpy on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jax_it.data.packing import Shape


class Seq2SeqBatch(NamedTuple):
    """Rows of an encoder-decoder. Segment 0 is padding; the letters are those of `models/layers.py`.

    A row holds one example, or several with segments 1, 2, …: G blocks of S source positions beside T
    target positions. Arrays are int32, weights float32.
    """

    source_BGS: np.ndarray
    source_segments_BGS: np.ndarray
    source_positions_BGS: np.ndarray  # within the segment
    tokens_BT: np.ndarray  # the targets, shifted right within each segment
    targets_BT: np.ndarray
    weights_BT: np.ndarray  # 1 where the loss counts
    segments_BT: np.ndarray
    positions_BT: np.ndarray


class CausalBatch(NamedTuple):
    """Rows of a causal model. Segment 0 is padding. Arrays are int32, weights float32.

    The target of a position is the token after it in the same segment; a segment's last token has none.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray  # 1 where the loss counts
    segments_BT: np.ndarray
    positions_BT: np.ndarray  # within the segment
    prefix_BT: np.ndarray | None = None  # of a prefix-LM: 1 in a segment's prompt, whose positions see each other


class Placed(NamedTuple):
    """An example's tokens and the block of the row that its source goes to."""

    source: np.ndarray
    target: np.ndarray
    block: int


@dataclass(frozen=True)
class Seq2SeqFormat:
    """How an encoder-decoder sees examples: the only thing of the model that batches depend on."""

    start: int  # the decoder's first token
    pad: int

    def batch(self, rows: Sequence[Sequence[Placed]], shape: Shape) -> Seq2SeqBatch:
        """A batch of these rows, each a list of examples; an empty list makes a row of padding."""
        number = len(rows)
        source = np.full((number, shape.blocks, shape.source), self.pad, np.int32)
        source_segments = np.zeros_like(source)
        source_positions = np.zeros_like(source)
        tokens = np.full((number, shape.target), self.pad, np.int32)
        targets, segments, positions = tokens.copy(), np.zeros_like(tokens), np.zeros_like(tokens)
        for r, row in enumerate(rows):
            used = [0] * shape.blocks
            at = 0
            for segment, example in enumerate(row, 1):
                here = (r, example.block, slice(used[example.block], used[example.block] + len(example.source)))
                source[here] = example.source
                source_segments[here] = segment
                source_positions[here] = np.arange(len(example.source))
                used[example.block] += len(example.source)
                there = slice(at, at + len(example.target))
                targets[r, there] = example.target
                tokens[r, at] = self.start
                tokens[r, at + 1 : there.stop] = example.target[:-1]
                segments[r, there] = segment
                positions[r, there] = np.arange(len(example.target))
                at = there.stop
        weights = (segments > 0).astype(np.float32)
        return Seq2SeqBatch(source, source_segments, source_positions, tokens, targets, weights, segments, positions)


def bucket(length: int, limit: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that holds `length`, at most `limit`: few compiled shapes."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, limit)
