"""Model families. Outside this package a model is pure functions of a params tree with known axis letters."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it import losses
from jax_it.config import Model as ModelConfig
from jax_it.errors import UserError
from jax_it.models import t5
from jax_it.models.weights import Weight, flatten, unflatten

Params = dict[str, Any]  # nested dicts of arrays

FAMILIES = {"t5": t5, "mt5": t5, "umt5": t5}  # model_type of config.json -> the module that computes it


@dataclass(frozen=True)
class Model:
    """A family's pure functions for one configuration. `params` is always the first argument."""

    values: Mapping[str, Any]  # config.json
    config: t5.Config
    run: t5.Run

    def init(self, key: jax.Array) -> Params:
        """Random float32 weights, with the distributions that the family's authors trained from."""
        return nnx.to_pure_dict(nnx.state(t5.T5(self.config, rngs=nnx.Rngs(params=key))))

    @cached_property
    def shapes(self) -> Params:
        """The params as ShapeDtypeStructs; nothing is computed."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The weight table, path by path."""
        table = t5.weight_table(self.config)
        assert table.keys() == flatten(self.shapes).keys(), "the weight table and the module name other weights"
        return table

    @cached_property
    def letters(self) -> Params:
        """The params' tree with each weight's axis letters."""
        return unflatten({path: weight.letters for path, weight in self.weights.items()})

    @cached_property
    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

    def apply(self, params: Params, batch: Any, key: jax.Array | None = None) -> jax.Array:
        """States before the head [B, T, D] for every target position; dropout where a key is given."""
        return self._module(params)(batch, self.run, key)

    def head(self, params: Params) -> jax.Array:
        """The weights that `logits` takes, [V, D]."""
        return params["embedding" if self.config.tied else "head"]

    def logits(self, head_VD: jax.Array, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of states [..., D]."""
        return t5.head_logits(self.config, head_VD, hidden)

    def loss_sum(
        self, loss: losses.TokenLoss, chunk: int, params: Params, batch: Any, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of a batch's token losses and the sum of the weights; see `losses.chunked_sum`."""
        hidden_BTD = self.apply(params, batch, key)
        return losses.chunked_sum(
            loss, self.logits, chunk, self.head(params), hidden_BTD, batch.targets_BT, batch.weights_BT
        )

    def prefill(self, params: Params, source_BS: jax.Array, segments_BS: jax.Array, length: int) -> t5.Cache:
        """The cache for at most `length` target tokens of each source; segment 0 is padding."""
        return self._module(params).prefill(source_BS, segments_BS, length, self.run)

    def step(
        self, params: Params, tokens_B: jax.Array, positions_B: jax.Array, cache: t5.Cache
    ) -> tuple[jax.Array, t5.Cache]:
        """Logits [B, V] after one more token a row, which stands at that row's position, and the new cache."""
        hidden_BD, cache = self._module(params).step(tokens_B, positions_B, cache, self.run)
        return self.logits(self.head(params), hidden_BD), cache

    def take_rows(self, cache: t5.Cache, rows_B: jax.Array) -> t5.Cache:
        """The cache whose target row b is row `rows_B[b]` of this one; both must have the same source.

        The sources stay. Where there are n times as many rows as sources, row b has source b // n.
        """
        return t5.take_rows(cache, rows_B)

    def _module(self, params: Params) -> t5.T5:
        """The module with its weights in the computation's dtype; norms and biases stay float32."""
        graph, _ = nnx.split(nnx.eval_shape(lambda: t5.T5(self.config, rngs=nnx.Rngs(params=jax.random.key(0)))))

        def cast(letters: str, array: jax.Array) -> jax.Array:
            vector = len(letters.removeprefix("L ").split()) == 1
            return array if vector or "E" in letters else array.astype(self.run.dtype)

        return nnx.merge(graph, jax.tree.map(cast, self.letters, params))


def build(values: Mapping[str, Any], where: str, model: ModelConfig) -> Model:
    """The model of a config.json's values. Raises UserError for one that is not implemented."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r} is not supported; jax_it has {', '.join(FAMILIES)}")
    config = FAMILIES[kind].read_config(values, where)
    accelerator = jax.default_backend() != "cpu"
    dtype = {"auto": jnp.bfloat16 if accelerator else jnp.float32, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
    dropout = config.dropout if model.dropout is None else model.dropout
    return Model(values, config, t5.Run(dtype[model.dtype], model.remat == "layer", dropout))


def with_tied_head(model: Model, tied: bool) -> Model:
    """The same model whose head is, or is not, its embedding: what the checkpoint's weights say."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, tied=tied))
