"""What a model family is: how its config.json is read, where its weights are, and the module that computes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jax_it.config import Kind
from jax_it.models.config import ComputeOptions
from jax_it.models.kv_cache import KVCache
from jax_it.models.stack import Stack
from jax_it.models.weights import WeightSpec


class Module(Protocol):
    """What every family's module offers; it is made as `module(config, rngs=...)`."""

    embedding: Any
    decoder: Stack

    def hidden_states(self, batch: Any, options: ComputeOptions, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Return the states before the head [B, T, D] of a batch, and how experts were chosen, summed over layers.

        A key is for dropout.
        """

    def prefill(
        self, prompts_BS: jax.Array, segments_BS: jax.Array, max_new_tokens: int, options: ComputeOptions
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """Read prompts, or sources. Return what the first step takes: tokens [B], their positions [B], the cache."""

    def decode_step(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache, options: ComputeOptions
    ) -> tuple[jax.Array, KVCache]:
        """Compute one more token a row, at its own position. Return its states [B, D] and the new cache."""


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    kind: Kind
    architecture: str  # Transformers' class
    read_config: Callable[[Mapping[str, Any], str], Any]
    weight_table: Callable[[Any], dict[str, WeightSpec]]
    module: Callable[..., Any]
    logits: Callable[..., jax.Array]  # (config, head_VD, states) -> float32 logits
    embedding: str  # Transformers' name of the embedding, which a tied head repeats
    head: str
    aliases: Mapping[str, str] | None = None  # names under which a checkpoint may repeat a weight: the same bytes
    ignored: str = ""  # a regular expression of tensors of old checkpoints that no Transformers version reads
    prefix: str = ""  # of all names but the head's, which a checkpoint may leave out
    # The values of config.json without which Transformers would build another model.
    values_to_save: Callable[[Any], dict[str, Any]] = lambda config: {}
