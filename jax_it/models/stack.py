"""A stack of layers, computed by scans: one over the layers of each run, and one over the repeats of the runs.

In Gemma 3, for example, the body of the outer scan is a scan of five layers with a window, and then a layer without.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import kv_cache
from jax_it.models.attention import Mask, Scores
from jax_it.models.config import ComputeOptions, LayerKind, StackConfig
from jax_it.models.dropout import dropout, split_key
from jax_it.models.experts import Routing
from jax_it.models.kv_cache import CrossKeyValue, KeyValue, KVCache, LayerCache, Source
from jax_it.models.layer import Context, Layer
from jax_it.models.linear import normal
from jax_it.models.norm import Norm
from jax_it.models.relative_bias import DistanceBias, RelativeBias
from jax_it.models.rope import CosSin, Rope
from jax_it.models.sections import LayerRun, cut, group_layers, scanned
from jax_it.sharding import constrain


class LayerRef(NamedTuple):
    """Which layer of a stack is computed."""

    kind: LayerKind
    group: int  # of the cache
    index: Any  # in the group
    dropout_key: Any  # or None


class Stack(nnx.Module):
    """Layers and the norm after them, from embedded tokens to states."""

    def __init__(self, c: StackConfig, *, rngs: nnx.Rngs):
        self.config, self.sections = c, scanned(c)
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.layers: Any = nnx.vmap(lambda key: Layer(c, rngs=nnx.Rngs(params=key)))(keys)  # weights [L, …]
        self.norm = Norm(c.norm, (c.embed_dim,), c.norm_eps)
        if c.relative_bias and not c.relative_bias.per_layer:
            self.relative_bias = normal(rngs, (c.relative_bias.buckets, c.num_heads), c.embed_dim**-0.5)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, real_BT: jax.Array, mask: Mask, options: ComputeOptions,
        key: jax.Array | None = None, *, lengths_BT: jax.Array | None = None, encoded_BSD: jax.Array | None = None,
        cross_mask: Mask | None = None, cache_to_B: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KeyValue], Routing | None]:  # fmt: skip
        """Compute all positions at once.

        Return three values: the states after the final norm [B, T, D]; if `cache_to_B` is given, the cache's groups,
        which hold each row up to that position; and the routing summed over layers.

        `real_BT` is false for padding. `lengths_BT` is the length of the text that each position belongs to, which
        LongRoPE depends on.
        """
        c, length = self.config, x_BTD.shape[1]

        def bias(relative: RelativeBias, table_EN: jax.Array) -> jax.Array | DistanceBias:
            by_distance = relative.by_distance(table_EN, length)
            return by_distance if options.fused_attention else by_distance.square()

        context = Context(
            options, self._scores(options), self._cos_sin(positions_BT, lengths_BT), self._bias_of(bias), real_BT,
            mask._replace(allowed_BTS=constrain(mask.allowed_BTS, "B T S")), encoded_BSD, cross_mask,
        )  # fmt: skip

        def compute(x_BTD: jax.Array, layer: Layer, ref: LayerRef) -> tuple:
            x_BTD, (key_BTKH, value_BTKH), routing = layer(x_BTD, context, ref.kind, dropout_key=ref.dropout_key)
            if cache_to_B is None:
                return x_BTD, (None, routing)
            return x_BTD, (kv_cache.from_prompt(key_BTKH, value_BTKH, cache_to_B, ref.kind.window), routing)

        embedding_key, layers_key = split_key(key, 2)
        keys = None if layers_key is None else jax.random.split(layers_key, c.num_layers)
        x_BTD = dropout(x_BTD, options.dropout, embedding_key)
        x_BTD, outputs = self._compute_layers(compute, x_BTD, keys, remat=options.remat)
        routing = jax.tree.map(lambda *groups: sum(x.sum(0) for x in groups), *(routing for _, routing in outputs))
        return self.norm(x_BTD), [group for group, _ in outputs], routing

    def step(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache, options: ComputeOptions,
        real_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:  # fmt: skip
        """Compute the next tokens of each row. Return normed states [B, T, D] and the new cache.

        They are one token a row or, without a relative bias, several. `real_BT` is false for padding behind them. There
        may be fewer rows than the cache has: its first ones.
        """
        source, distance_BS = cache.source, jnp.arange(cache.capacity) - positions_BT[:, :1]
        if source:
            sources = len(x_BTD) * len(source.segments) // cache.rows
            source = Source(source.groups, source.segments[:sources])
        context = Context(
            options, self._scores(options), self._cos_sin(positions_BT, positions_BT + 1),
            self._bias_of(lambda bias, table_EN: bias.rows(table_EN, distance_BS)),
            real_BT=jnp.ones(x_BTD.shape[:2], bool) if real_BT is None else real_BT,
        )  # fmt: skip

        def compute(carry: tuple, layer: Layer, ref: LayerRef) -> tuple:
            (x_BTD, groups), group = carry, ref.group
            cross = (source.groups[group], source.segments) if source else ()
            layer_cache = LayerCache(groups[group], ref.index, positions_BT, cache.capacity, real_BT, *cross)
            x_BTD, layer_cache, _ = layer(x_BTD, context, ref.kind, layer_cache)
            return (x_BTD, (*groups[:group], layer_cache.group, *groups[group + 1 :])), None

        (x_BTD, groups), _ = self._compute_layers(compute, (x_BTD, cache.groups))
        return self.norm(x_BTD), dataclasses.replace(cache, groups=groups)

    def encode_cross_kv(self, states_BSD: jax.Array) -> tuple[CrossKeyValue, ...]:
        """Make a source's keys and values for cross-attention in every layer, once for all steps."""

        def compute(_: None, layer: Layer, ref: LayerRef) -> tuple:
            assert layer.cross is not None
            keys_values = layer.cross.keys_values(states_BSD, len(states_BSD))
            return None, CrossKeyValue(*kv_cache.by_head(*keys_values))

        return tuple(self._compute_layers(compute, None)[1])

    def init_cache(self, rows: int, capacity: int, dtype: Any, source: Source | None = None) -> KVCache:
        """Return a cache that holds no token yet."""
        c, windows = self.config, self.windows()
        numbers = [section.repeats * run.length for section in self.sections for run in section.runs]
        groups = tuple(
            kv_cache.init_group(number, rows, c.num_kv_heads, c.head_dim, min(window or capacity, capacity), dtype)
            for number, window in zip(numbers, windows, strict=True)
        )
        return KVCache(groups, capacity, windows, source)

    def windows(self) -> tuple[int, ...]:
        """Return the window of each group of layers; 0: none."""
        return tuple(run.kind.window for section in self.sections for run in section.runs)

    def _compute_layers(
        self, compute: Callable[[Any, Layer, LayerRef], tuple], carry: Any, keys: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[Any, list[Any]]:  # fmt: skip
        """Call `carry, output = compute(carry, layer, ref)` for all layers in turn; `keys` has one for each.

        Return the last carry, and each group's outputs with a leading axis L.
        """
        layers = self.layers if isinstance(self.layers, nnx.List) else group_layers(self.layers, self.sections)
        graph = nnx.graphdef(layers[0])

        def compute_layer(kind: LayerKind, group: int, carry: Any, xs: tuple) -> tuple:
            index, weights, key = xs
            return compute(carry, nnx.merge(graph, weights), LayerRef(kind, group, index, key))

        def compute_runs(runs: tuple[LayerRun, ...], first: int, carry: Any, xs: list[tuple]) -> tuple:
            outputs = []
            for group, (run, run_xs) in enumerate(zip(runs, xs, strict=True), first):
                carry, output = _scan(partial(compute_layer, run.kind, group), carry, run_xs, remat)
                outputs.append(output)
            return carry, outputs

        weights = [nnx.state(layer) for layer in layers]
        indices = [jnp.arange(n * run.length).reshape(n, -1) for n, runs in self.sections for run in runs]
        xs = list(zip(indices, weights, cut(keys, self.sections), strict=True))
        outputs: list[Any] = []
        for _, runs in self.sections:
            first, end = len(outputs), len(outputs) + len(runs)
            carry, found = _scan(partial(compute_runs, runs, first), carry, xs[first:end])
            outputs += [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output) for output in found]
        return carry, outputs

    def _scores(self, options: ComputeOptions) -> Scores:
        c = self.config
        return Scores(c.scale, c.attn_logit_softcap, options.dropout if "attention" in c.dropout_in else 0.0)

    def _cos_sin(self, positions_BT: jax.Array, lengths_BT: jax.Array | None) -> dict[Rope | None, CosSin]:
        ropes = dict.fromkeys(kind.rope for kind in self.config.layer_kinds if kind.rope)
        return {rope: rope.cos_sin(positions_BT, lengths_BT) for rope in ropes}

    def _bias_of(self, make: Callable[[RelativeBias, jax.Array], Any]) -> Callable[[Layer], Any]:
        """Return what gives each layer's relative bias, made of its own table, or once of the stack's."""
        relative = self.config.relative_bias
        if relative is None:
            return lambda layer: None
        if relative.per_layer:
            return lambda layer: make(relative, layer.relative_bias[...])
        shared = make(relative, self.relative_bias[...])
        return lambda layer: shared


def _scan(body: Callable[[Any, Any], tuple], carry: Any, xs: Any, remat: bool = False) -> tuple[Any, Any]:
    """Do as `jax.lax.scan`, without a loop around a single step; `remat`: the backward pass computes steps again."""
    checkpoint = jax.checkpoint if remat else (lambda body: body)
    if len(jax.tree.leaves(xs)[0]) > 1:
        return jax.lax.scan(checkpoint(body), carry, xs)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        # Indexed here, so that a step that is computed again keeps no slice of its weights.
        carry, output = body(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: x[None], output)

    return checkpoint(step)(carry, xs)
