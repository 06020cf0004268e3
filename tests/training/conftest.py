"""Tiny models and a handful of examples for each, as rows of their own and packed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jax_it import config as settings
from jax_it import pretrained
from jax_it.data.encoded import Encoded
from jax_it.data.formats import CausalBatch, CausalFormat, Format, Seq2SeqBatch, Seq2SeqFormat, pack_rows
from jax_it.data.packing import Layout, Shape
from jax_it.models import Model, Params, build
from tests.parity import causal_cases

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
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "head_dim": 4,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # which four devices cannot share, but two can
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
SOURCE, TARGET = 24, 12  # an example's longest
EXAMPLES = 32  # divisible by 4 micro-batches on 8 devices


class Tiny(NamedTuple):
    model: Model
    params: Params
    padded: Any
    packed: Any


def make(values: Any, format: Format, examples: Sequence[Encoded], alone: Shape, together: Shape) -> Tiny:
    """The model with random weights; a batch with a row of shape `alone` for each example, and one of packed rows."""
    model = build(values, "the test", settings.Model(pretrained=False))
    padded = format.batch([[Encoded(e.source, e.target, 0, e.loss_mask)] for e in examples], alone)
    (packed,) = pack_rows(format, examples, Layout(together, EXAMPLES, 1.0, 1.0, 1.0), EXAMPLES)
    used = int((packed.segments_BT > 0).any(1).sum())
    assert used < 20 and packed.segments_BT.max() > 1, "the examples must really share rows"
    return Tiny(model, jax.jit(model.init)(jax.random.key(1)), padded, packed)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    random = np.random.default_rng(0)
    examples = [
        Encoded(
            random.integers(2, 64, random.integers(2, SOURCE + 1)),
            random.integers(2, 64, random.integers(1, TARGET + 1)),
        )
        for _ in range(EXAMPLES)
    ]
    made = make(ARCHITECTURE, Seq2SeqFormat(start=0, pad=0), examples, Shape(1, SOURCE, TARGET), Shape(2, SOURCE, 20))
    assert isinstance(made.packed, Seq2SeqBatch)
    return made


def causal(values: Any) -> Tiny:
    """For a causal model: prompts, answers that are trained on, and in some examples a second pair of them."""
    random = np.random.default_rng(0)
    examples = []
    for number in range(EXAMPLES):
        turns = [random.integers(1, 10, 2) for _ in range(1 + number % 2)]
        trained = np.concatenate([np.repeat([False, True], lengths) for lengths in turns])
        examples.append(
            Encoded(np.zeros(0, int), random.integers(5, values["vocab_size"], len(trained)), loss_mask=trained)
        )
    made = make(values, CausalFormat(pad=0), examples, Shape(0, 0, 36), Shape(0, 0, 40))
    assert isinstance(made.packed, CausalBatch)
    return made


@pytest.fixture(scope="session")
def tiny_llama() -> Tiny:
    return causal(LLAMA)


@pytest.fixture(scope="session")
def tiny_mixtral() -> Tiny:
    return causal(causal_cases.MIXTRAL)


@pytest.fixture(scope="session")
def tiny_adapted(tiny_llama: Tiny) -> Tiny:
    """The Llama with adapters, of random numbers in both matrices: fresh ones leave the first without a gradient."""
    lora = settings.Lora(rank=2, alpha=4.0)
    model = pretrained.add_adapter(tiny_llama.model, settings.Model(lora=lora))
    assert model.adapter is not None
    shapes, rest = jax.tree.flatten(model.trained_shapes)
    keys = jax.random.split(jax.random.key(2), len(shapes))
    adapter = rest.unflatten(0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, shapes, strict=True))
    return tiny_llama._replace(model=model, params=model.join(adapter, tiny_llama.params))
