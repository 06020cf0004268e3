"""Texts as vectors: the mean of a model's hidden states."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import run
from jax_it.data.encoding import text_prompts
from jax_it.data.formats import CausalBatch
from jax_it.generation import length_buckets
from jax_it.models import Model, Params

LENGTH = 512  # tokens that are read of a text
ROWS = 32  # texts computed at a time
BUFFER = 1024  # texts that are sorted by length at a time


class Encoder:
    """A run's, a Transformers folder's or a hub's model. Raises UserError where it cannot be loaded."""

    def __init__(self, path: str):
        self._model, self._params, self._tokenizer = run.load(path)
        self.size = int(self._model.head(self._params).shape[1])
        self._mean = jax.jit(partial(_mean_states, self._model))

    def states(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the vectors of up to BUFFER texts at a time, float32 [N, D], each of length 1."""
        items = iter(texts)
        while some := list(islice(items, BUFFER)):
            tokens = [ids[:LENGTH] for ids in text_prompts(some, self._tokenizer)]
            order = sorted(range(len(some)), key=lambda i: len(tokens[i]))
            states_ND = np.zeros((len(some), self.size), np.float32)
            for begin in range(0, len(order), ROWS):
                rows = order[begin : begin + ROWS]
                width = length_buckets.round_up(len(tokens[rows[-1]]))
                batch = length_buckets.pad([tokens[i] for i in rows], ROWS, width)
                states_ND[rows] = np.asarray(self._mean(self._params, *batch))[: len(rows)]
            yield states_ND


def _mean_states(model: Model, params: Params, tokens_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
    if model.kind == "seq2seq":
        states_BSD = model.encode(params, tokens_BS, segments_BS)
    else:
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        arrays: Any = tokens_BS, tokens_BS, segments_BS, segments_BS, positions_BS, jnp.zeros_like(tokens_BS)
        batch = CausalBatch(*arrays)
        states_BSD = model.hidden_states(params, batch)[0]
    sum_BD = jnp.where(segments_BS[..., None] > 0, states_BSD.astype(jnp.float32), 0).sum(1)
    return sum_BD / jnp.maximum(jnp.linalg.norm(sum_BD, axis=1, keepdims=True), 1e-12)
