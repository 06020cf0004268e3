"""Model families. Outside this package a model is pure functions of a params tree with known logical axes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.config import Kind
from jax_it.config import Model as ModelConfig
from jax_it.errors import UserError, shown
from jax_it.models.config import CausalLMConfig, ComputeOptions, EncoderDecoderConfig
from jax_it.models.dropout import split_key
from jax_it.models.experts import Routing
from jax_it.models.families import FAMILIES
from jax_it.models.family import Family, Module
from jax_it.models.kv_cache import KVCache
from jax_it.models.lora import Adapter
from jax_it.models.quantized import Quantized
from jax_it.models.sections import group_layers, unrolled, unstack_layers
from jax_it.models.weights import WeightSpec, flatten, is_matrix, unflatten

Params = dict[str, Any]  # nested dicts of arrays

ADAPTER = "adapter"  # the params' entry that holds the adapters


class DecodingWeights(NamedTuple):
    """Weights prepared for decoding, in the computation's dtype."""

    module: Module  # without an encoder; on CPUs and GPUs each layer by itself
    head_VD: jax.Array


@dataclass(frozen=True)
class Model:
    """A family's pure functions for one configuration. `params` is always the first argument.

    Params are the weights of the base model, and under "adapter" the adapters, if the model has any. What
    is trained is the adapters, or else everything.
    """

    values: Mapping[str, Any]  # config.json
    family: Family
    config: CausalLMConfig | EncoderDecoderConfig
    options: ComputeOptions
    adapter: Adapter | None = None

    @property
    def kind(self) -> Kind:
        return self.family.kind

    @property
    def start_and_pad(self) -> tuple[int, int]:
        """The tokens that start and fill an encoder-decoder's targets."""
        assert isinstance(self.config, EncoderDecoderConfig)
        return self.config.decoder_start_token_id, self.config.pad_token_id

    def init(self, key: jax.Array) -> Params:
        """Draw random float32 weights of the base model, with the distributions that its authors trained from."""
        return nnx.to_pure_dict(nnx.state(self.family.module(self.config, rngs=nnx.Rngs(params=key))))

    @cached_property
    def _abstract(self) -> tuple[Any, Any]:
        """The module's graph, and its weights as ShapeDtypeStructs; nothing is computed."""
        make = self.family.module
        return nnx.split(nnx.eval_shape(lambda: make(self.config, rngs=nnx.Rngs(params=jax.random.key(0)))))

    @cached_property
    def shapes(self) -> Params:
        """The base model's weights as ShapeDtypeStructs."""
        return nnx.to_pure_dict(self._abstract[1])

    @cached_property
    def weights(self) -> dict[str, WeightSpec]:
        """The base model's weight table, path by path."""
        table, paths = self.family.weight_table(self.config), flatten(self.shapes)
        assert table.keys() == paths.keys(), f"only one of table and module has {table.keys() ^ paths.keys()}"
        return table

    @cached_property
    def logical_axes(self) -> Params:
        """The tree of `shapes` with each weight's logical axes."""
        return unflatten({path: weight.logical_axes for path, weight in self.weights.items()})

    @cached_property
    def depths(self) -> dict[str, int]:
        """How many layers each weight is stacked from, path by path."""
        stacked = {path for path, weight in self.weights.items() if weight.stacked}
        return {path: shape.shape[0] for path, shape in flatten(self.shapes).items() if path in stacked}

    @cached_property
    def trained_logical_axes(self) -> Params:
        """The tree of what is trained, with logical axes."""
        return self.adapter.logical_axes(self.weights) if self.adapter else self.logical_axes

    @cached_property
    def trained_shapes(self) -> Params:
        """The tree of what is trained, as float32 ShapeDtypeStructs."""
        if self.adapter is None:
            return self.shapes
        return jax.eval_shape(self.init_adapter, jax.random.key(0), self.shapes)

    def init_adapter(self, key: jax.Array, base: Params) -> Params:
        """Draw adapters that change nothing yet, beside the weights `base`."""
        assert self.adapter is not None
        return self.adapter.init(key, self.weights, base)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return (what is trained, the rest)."""
        if self.adapter is None:
            return params, {}
        return params[ADAPTER], {name: value for name, value in params.items() if name != ADAPTER}

    def join(self, trained: Params, frozen: Params) -> Params:
        """Undo `split`."""
        return trained if self.adapter is None else {**frozen, ADAPTER: trained}

    def merge(self, params: Params) -> tuple["Model", Params]:
        """Return the same model without adapters, its weights in float32 with what these add."""
        trained, base = self.split(params)
        if self.adapter is None:
            return self, params
        return dataclasses.replace(self, adapter=None), self.adapter.merge(base, trained, self.weights)

    @cached_property
    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

    @cached_property
    def trained_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained_shapes))

    def hidden_states(
        self, params: Params, batch: Any, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """Return the states before the head [B, T, D] of every target position, and the routing.

        The routing is how a mixture of experts sends the tokens, summed over layers. A key is for dropout.
        """
        model_key, adapter_key = split_key(key, 2)
        return self._module(params, adapter_key).hidden_states(batch, self.options, model_key)

    def encode(self, params: Params, source_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
        """Return an encoder-decoder's encoder states [B, S, D]; segment 0 is padding."""
        positions_BS = jnp.broadcast_to(jnp.arange(source_BS.shape[1]), source_BS.shape)
        rows = (array[:, None] for array in (source_BS, segments_BS, positions_BS))
        states_BSD: jax.Array = self._module(params).encode(*rows, self.options)
        return states_BSD

    @property
    def _head_path(self) -> str:
        return "embedding" if self.config.tied else "head"

    @property
    def trains_head(self) -> bool:
        """Return whether the weights that `logits` takes are trained, or rows of them."""
        return self.adapter is None or self._head_path in self.adapter.token_weights

    def head(self, params: Params) -> jax.Array:
        """Return the weights that `logits` takes, [V, D]."""
        head_VD: jax.Array = params[self._head_path]
        return self.adapter.with_rows(self._head_path, head_VD, params[ADAPTER]) if self.adapter else head_VD

    def logits(self, head_VD: jax.Array, states: jax.Array) -> jax.Array:
        """Return float32 logits [..., V] of states [..., D]."""
        return self.family.logits(self.config, head_VD, states)

    def prefill(
        self, params: Params, prompts_BS: jax.Array, segments_BS: jax.Array, max_new_tokens: int
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """Return (each row's last prompt token [B], its position [B], the cache of the tokens before it).

        These are what the first `decode_step` takes; an encoder-decoder's first token is the start token. The cache has
        capacity for `max_new_tokens` new tokens in each row; segment 0 is padding.
        """
        module = self._module(params)
        token_B, position_B, cache = module.prefill(prompts_BS, segments_BS, max_new_tokens, self.options)
        if self.options.unrolled:
            cache = unstack_layers(cache, module.decoder.sections)
        return token_B, position_B, cache

    def prepare_for_decoding(self, params: Params) -> DecodingWeights:
        """Prepare weights for many steps of `decode_step`: call it once, outside of loops."""
        module = self._module(params)
        if self.kind == "seq2seq":
            del module.encoder
        stack = module.decoder
        if self.options.unrolled:
            stack.sections = unrolled(stack.config)
        stack.layers = nnx.List(group_layers(stack.layers, stack.sections))
        return DecodingWeights(module, self.head(params))

    def decode_step(
        self, weights: DecodingWeights, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Return the logits [B, V] after one more token a row, at that row's position, and the new cache."""
        states_BD, cache = weights.module.decode_step(tokens_B, positions_B, cache, self.options)
        return self.logits(weights.head_VD, states_BD), cache

    @property
    def can_extend(self) -> bool:
        """Return whether `extend` can compute a text in parts: what a token computes depends on those before alone."""
        c = self.config
        return isinstance(c, CausalLMConfig) and not self.options.prefix_lm and not c.longrope_length

    def extend(
        self, weights: DecodingWeights, tokens_BT: jax.Array, segments_BT: jax.Array, start_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Return the logits [B, T, V] after more tokens of each row, from position `start_B` on, and the new cache.

        Segment 0 is padding behind a row's tokens.
        """
        assert self.can_extend
        module: Any = weights.module
        states_BTD, cache = module.extend(tokens_BT, segments_BT, start_B, cache, self.options)
        return self.logits(weights.head_VD, states_BTD), cache

    def _module(self, params: Params, adapter_key: jax.Array | None = None) -> Any:
        """Return the module with its weights in the computation's dtype; norms and biases stay float32."""

        def cast(logical_axes: str, weight: Any) -> Any:
            stays = isinstance(weight, Quantized) or not is_matrix(logical_axes)
            return weight if stays else weight.astype(self.options.dtype)

        trained, frozen = self.split(params)
        if self.adapter is None:
            weights = jax.tree.map(cast, self.logical_axes, trained)
        else:
            base = jax.tree.map(cast, self.logical_axes, jax.lax.stop_gradient(frozen))
            weights = self.adapter.attach(base, trained, adapter_key)
        return nnx.merge(self._abstract[0], weights)


def build(values: Mapping[str, Any], where: str, model: ModelConfig) -> Model:
    """Return the model of a config.json's values. Raises UserError for one that is not implemented."""
    kind = values.get("model_type")
    if kind is None:
        raise UserError(f"{where}: model_type is missing: these are not the values of a model in Transformers format")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type {shown(kind)} is not supported; jax_it has {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if model.prefix_lm and family.kind != "causal":
        raise UserError(f"config.model.prefix_lm: {kind} is an encoder-decoder, which reads both ways anyway")
    config = family.read_config(values, where)
    dtype = {"auto": default_dtype(), "float32": jnp.float32, "bfloat16": jnp.bfloat16}
    dropout = config.dropout if model.dropout is None else model.dropout
    on_tpu, on_cpu = (jax.default_backend() == platform for platform in ("tpu", "cpu"))
    chosen = model.attention == "auto"
    if model.prefix_lm and config.recompute_longrope and config.longrope_length:
        raise UserError(f"config.model.prefix_lm: the longrope of {where} is computed for causal attention alone")
    options = ComputeOptions(
        dtype[model.dtype], model.remat == "layer", dropout, model.prefix_lm, fused_attention=chosen and on_tpu,
        recompute=chosen and on_cpu, unrolled=not on_tpu,
    )  # fmt: skip
    return Model(values, family, config, options)


def default_dtype() -> Any:
    """Return the dtype of computation: float32 on CPU, where bfloat16 is slow."""
    return jnp.bfloat16 if jax.default_backend() != "cpu" else jnp.float32


def with_tied_head(model: Model, tied: bool) -> Model:
    """Return the same model whose head is, or is not, its embedding: what the checkpoint's weights say."""
    if model.config.tied == tied:
        return model
    config: Any = model.config
    return dataclasses.replace(model, config=dataclasses.replace(config, tied=tied))
