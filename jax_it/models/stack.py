"""A stack of layers that repeats a period of layer kinds: a scan over whole periods, and the layers that are left over.

Gemma 3, for example, has five layers with a window to one without: the scan's body computes six layers, each with its
static window and rope.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import kv_cache
from jax_it.models.config import ComputeOptions, LayerKind, StackConfig
from jax_it.models.experts import Routing
from jax_it.models.kv_cache import CrossKeyValue, KeyValue, KVCache, LayerCache, Source
from jax_it.models.layer import Context, EncoderStates, Layer
from jax_it.models.linear import dropout, normal, split_key
from jax_it.models.norm import Norm
from jax_it.sharding import constrain


class Place(NamedTuple):
    """Which layer of a stack is computed."""

    kind: LayerKind
    group: int  # of the cache
    index: Any  # in the group
    key: Any  # for dropout, or None


class Groups(nnx.Module):
    """A stack's layers as they are computed: whole periods, whose weights have the axes [repeats, period, …], and then
    the layers that are left over, each by itself.
    """

    def __init__(self, periods: Any, rest: list[Any]):
        self.periods = periods  # a Layer, or None
        self.rest = nnx.List(rest)


class Stack(nnx.Module):
    """Layers and the norm after them, from embedded tokens to states."""

    def __init__(self, c: StackConfig, *, rngs: nnx.Rngs):
        self.config = c
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.layers: Any = nnx.vmap(lambda key: Layer(c, rngs=nnx.Rngs(params=key)))(keys)  # weights [L, …]
        self.norm = Norm(c.norm, (c.embed_dim,), c.norm_eps)
        if c.relative_bias and not c.relative_bias.per_layer:
            self.relative_bias = normal(rngs, (c.relative_bias.buckets, c.num_heads), c.embed_dim**-0.5)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, mask_BTS: jax.Array,
        options: ComputeOptions, key: jax.Array | None = None, *, lengths_BT: jax.Array | None = None,
        encoder: EncoderStates | None = None, cache_to_B: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KeyValue], Routing | None]:  # fmt: skip
        """Compute all positions at once. Returns normed states [B, T, D]; the groups of a cache that holds each row up
        to its position `cache_to_B`, if given; and the routing summed over layers.

        `lengths_BT` is how many positions each one's text has in all, which LongRoPE depends on.
        """
        c, length = self.config, x_BTD.shape[1]
        bias = c.relative_bias
        context = Context(
            options, segments_BT > 0, self._cos_sin(positions_BT, lengths_BT), mask_BTS=constrain(mask_BTS, "B T S"),
            segments_BT=segments_BT, causal=not (c.bidirectional or options.prefix_lm), encoder=encoder,
            make_bias=partial(bias.square, length=length) if bias else None,
        )  # fmt: skip
        context = self._with_shared_bias(context)

        def layer(x_BTD: jax.Array, module: Layer, place: Place) -> tuple:
            x_BTD, (key_BTKH, value_BTKH), routing = module(x_BTD, context, place.kind, key=place.key)
            if cache_to_B is None:
                return x_BTD, (None, routing)
            return x_BTD, (kv_cache.from_prompt(key_BTKH, value_BTKH, cache_to_B, place.kind.window), routing)

        embedding_key, layers_key = split_key(key, 2)
        keys = None if layers_key is None else jax.random.split(layers_key, c.num_layers)
        x_BTD = dropout(x_BTD, options.dropout, embedding_key)
        x_BTD, outputs = self._run(layer, x_BTD, keys, remat=options.remat)
        routing = jax.tree.map(lambda *groups: sum(x.sum(0) for x in groups), *(routing for _, routing in outputs))
        return self.norm(x_BTD), [group for group, _ in outputs], routing

    def step(
        self, x_BTD: jax.Array, positions_B: jax.Array, cache: KVCache, options: ComputeOptions
    ) -> tuple[jax.Array, KVCache]:
        """Compute one more token a row, T = 1, at its own position: normed states [B, D], and the new cache."""
        bias, source = self.config.relative_bias, cache.source
        distance_BS = jnp.arange(cache.capacity) - positions_B[:, None]
        context = Context(
            options, jnp.ones(x_BTD.shape[:2], bool), self._cos_sin(positions_B[:, None], positions_B[:, None] + 1),
            make_bias=partial(bias.rows, distance_BS=distance_BS) if bias else None,
        )  # fmt: skip
        context = self._with_shared_bias(context)

        def layer(carry: tuple, module: Layer, place: Place) -> tuple:
            (x_BTD, groups), group = carry, place.group
            cross = (source.groups[group], source.segments) if source else ()
            layer_cache = LayerCache(groups[group], place.index, positions_B, *cross)
            x_BTD, layer_cache, _ = module(x_BTD, context, place.kind, layer_cache)
            return (x_BTD, (*groups[:group], layer_cache.group, *groups[group + 1 :])), None

        (x_BTD, groups), _ = self._run(layer, (x_BTD, cache.groups))
        return self.norm(x_BTD[:, 0]), dataclasses.replace(cache, groups=groups)

    def init_cache(self, rows: int, capacity: int, dtype: Any, source: Source | None = None) -> KVCache:
        """Return a cache that holds no token yet."""
        c, period = self.config, len(self.config.layer_kinds)
        layers = [c.num_layers // period] * period + [1] * (c.num_layers % period)
        windows = self.windows(len(layers))
        groups = tuple(
            kv_cache.init_group(n, rows, c.num_kv_heads, c.head_dim, min(window or capacity, capacity), dtype)
            for n, window in zip(layers, windows, strict=True)
        )
        return KVCache(groups, capacity, windows, source)

    def windows(self, groups: int) -> tuple[int, ...]:
        """Return the window of each of the groups of layers; 0: none."""
        kinds = self.config.layer_kinds
        return tuple(kinds[group % len(kinds)].window for group in range(groups))

    def encode_cross_kv(self, states_BSD: jax.Array) -> tuple[CrossKeyValue, ...]:
        """Make a source's keys and values for cross-attention in every layer, once for all steps."""

        def layer(_: None, module: Layer, place: Place) -> tuple:
            return None, CrossKeyValue(*kv_cache.by_head(*module.cross.keys_values(states_BSD)))

        return tuple(self._run(layer, None)[1])

    def _run(
        self,
        layer: Callable[[Any, Layer, Place], tuple[Any, Any]],
        carry: Any,
        keys: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[Any, list[Any]]:
        """Call `carry, output = layer(carry, module, place)` for all layers in turn; `keys` has one for each.

        Returns the last carry, and each group's outputs with a leading axis L.
        """
        kinds = self.config.layer_kinds
        groups = self.layers if isinstance(self.layers, Groups) else group_layers(self.layers, len(kinds))
        number = self.config.num_layers - len(groups.rest)  # of layers in whole periods
        outputs: list[Any] = []

        def call(carry: Any, graph: Any, state: Any, j: int | None, place: Place) -> tuple[Any, Any]:
            def compute(carry: Any, state: Any, index: Any, key: Any) -> tuple[Any, Any]:
                # Cut out here, so that a layer that is computed again keeps no slice of the period's weights.
                weights = state if j is None else jax.tree.map(lambda x: x[j], state)
                return layer(carry, nnx.merge(graph, weights), Place(place.kind, place.group, index, key))

            return (jax.checkpoint(compute) if remat else compute)(carry, state, place.index, place.key)

        if number:
            period = len(kinds)
            graph, state = nnx.split(groups.periods)

            def body(carry: Any, xs: tuple) -> tuple[Any, list[Any]]:
                index, state, keys = xs
                made = []
                for j, kind in enumerate(kinds):
                    key = None if keys is None else keys[j]
                    carry, output = call(carry, graph, state, j if period > 1 else None, Place(kind, j, index, key))
                    made.append(output)
                return carry, made

            period_keys = None if keys is None else keys[:number].reshape(-1, period)
            carry, outputs = jax.lax.scan(body, carry, (jnp.arange(number // period), state, period_keys))
        for i, module in enumerate(groups.rest, start=number):
            graph, state = nnx.split(module)
            place = Place(kinds[i % len(kinds)], len(outputs), 0, None if keys is None else keys[i])
            carry, output = call(carry, graph, state, None, place)
            outputs.append(jax.tree.map(lambda x: x[None], output))
        return carry, outputs

    def _cos_sin(self, positions_BT: jax.Array, lengths_BT: jax.Array | None) -> dict:
        ropes = dict.fromkeys(kind.rope for kind in self.config.layer_kinds if kind.rope)
        return {rope: rope.cos_sin(positions_BT, lengths_BT) for rope in ropes}

    def _with_shared_bias(self, context: Context) -> Context:
        if not hasattr(self, "relative_bias") or context.make_bias is None:
            return context
        return context._replace(bias=context.make_bias(self.relative_bias[...]))


def group_layers(layers: Layer, period: int, unroll: bool = False) -> Groups:
    """Group layers stacked along L into whole periods and a rest; unrolled, all layers are the rest.

    Layers by themselves compile more slowly than a scan, which copies a layer's weights whenever it comes to it.
    """
    graph, state = nnx.split(layers)
    depth = len(jax.tree.leaves(state)[0])
    number = 0 if unroll else depth // period * period
    rest = [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(number, depth)]
    if not number:
        return Groups(None, rest)
    if period > 1:
        state = jax.tree.map(lambda x: x[:number].reshape(-1, period, *x.shape[1:]), state)
    return Groups(nnx.merge(graph, state), rest)
