"""An example as token ids."""

from typing import NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """An example as token ids, int32, with the special tokens around them.

    An example of a causal model is all target, with a source of no token and a loss mask.
    """

    source: np.ndarray
    target: np.ndarray
    block: int = 0  # of a packed row: the block that holds the source
    loss_mask: np.ndarray | None = None  # bool, of the target: which tokens are trained on
