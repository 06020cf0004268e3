"""A tiny T5 and a handful of examples, as rows of their own and packed."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from jax_it import config as settings
from jax_it.data.batches import Placed, Seq2SeqBatch
from jax_it.data.formats import Seq2SeqFormat
from jax_it.data.packing import Shape, pack
from jax_it.models import Model, Params, build

ARCHITECTURE = {
    "model_type": "t5",
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
SOURCE, TARGET = 24, 12  # an example's longest


class Tiny(NamedTuple):
    model: Model
    params: Params
    padded: Seq2SeqBatch
    packed: Seq2SeqBatch


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    model = build(ARCHITECTURE, "ARCHITECTURE", settings.Model(architecture=ARCHITECTURE, pretrained=False))
    random = np.random.default_rng(0)
    examples = [
        (random.integers(2, 64, random.integers(2, SOURCE + 1)), random.integers(2, 64, random.integers(1, TARGET + 1)))
        for _ in range(32)
    ]
    format = Seq2SeqFormat(start=0, pad=0)
    padded = format.batch([[Placed(s, t, 0)] for s, t in examples], Shape(1, SOURCE, TARGET))
    shape = Shape(2, SOURCE, 20)
    rows = pack(np.array([len(s) for s, _ in examples]), np.array([len(t) for _, t in examples]), shape)
    placed: list[list[Placed]] = [
        [Placed(*examples[rows.members[i]], int(rows.block[i])) for i in range(rows.ends[r], rows.ends[r + 1])]
        for r in range(len(rows))
    ]
    assert len(placed) < 20, "the examples must really share rows"
    placed += [[]] * (-len(placed) % 32)  # divisible by 4 micro-batches on 8 devices
    packed = format.batch(placed, shape)
    return Tiny(model, jax.jit(model.init)(jax.random.key(1)), padded, packed)
