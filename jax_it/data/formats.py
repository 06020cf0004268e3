"""The two kinds of model that data is made for, which is all that it depends on of a model."""

from collections.abc import Sequence

import numpy as np

from jax_it.data.causal import CausalBatch, CausalFormat
from jax_it.data.encoded import Encoded
from jax_it.data.packing import Layout, Shape
from jax_it.data.seq2seq import Seq2SeqBatch, Seq2SeqFormat

Format = Seq2SeqFormat | CausalFormat
Batch = Seq2SeqBatch | CausalBatch

__all__ = [
    "Batch", "CausalBatch", "CausalFormat", "Format", "Seq2SeqBatch", "Seq2SeqFormat", "pack_rows",
]  # fmt: skip


def pack_rows(format: Format, examples: Sequence[Encoded], layout: Layout, rows: int) -> list[Batch]:
    """Return all examples in batches of `rows` packed rows; empty rows fill the last batch.

    The rows are twice as long as the layout's, or four times, where an example needs that. Examples without a token to
    train on are left out, so there may be no batch at all.
    """
    examples = [example for example in examples if example.loss_mask is None or example.loss_mask[1:].any()]
    if not examples:
        return []
    sources = np.array([len(example.source) for example in examples])
    targets = np.array([len(example.target) for example in examples])
    blocks, source, target = layout.shape
    while source < sources.max():
        source *= 2
    while target < targets.max():
        target *= 2
    shape = Shape(blocks, source, target)
    packed = format.pack(sources, targets, shape)
    filled = [[examples[i]._replace(block=block) for i, block in packed.row(row)] for row in range(len(packed))]
    filled += [[]] * (-len(filled) % rows)
    return [format.batch(filled[i : i + rows], shape) for i in range(0, len(filled), rows)]
