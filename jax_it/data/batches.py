"""What a training or evaluation step takes: arrays of static shapes, made by numpy on the host."""

from typing import NamedTuple

import numpy as np


class Seq2SeqBatch(NamedTuple):
    """Rows of an encoder-decoder. Segment 0 is padding; the letters are those of `models/config.py`.

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


class Encoded(NamedTuple):
    """An example as token ids, int32. A causal one is all target, with a source of no token."""

    source: np.ndarray
    target: np.ndarray
    learnt: np.ndarray | None = None  # bool, of a causal example: which of the target's tokens are learnt


class Placed(NamedTuple):
    """An example's tokens and the block of the row that its source goes to."""

    source: np.ndarray
    target: np.ndarray
    block: int
    learnt: np.ndarray | None = None


def bucket(length: int, limit: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that holds `length`, at most `limit`: few compiled shapes."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, limit)
