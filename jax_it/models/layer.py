"""One transformer layer, for every family: `layer(x, context, kind, cache) -> x, cache, routing`.

A mixer (self-attention), cross-attention in an encoder-decoder's decoder, and a feed-forward layer, each with a
residual connection. The same code trains and reads prompts (all positions at once, no cache) and decodes (the next
positions of each row, with a cache). `StackConfig` says which of the options a family takes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from jax_it.models.attention import Mask, Scores, gather_kv
from jax_it.models.cache_attention import attend_to_cache
from jax_it.models.config import ComputeOptions, LayerKind, StackConfig
from jax_it.models.dropout import dropout, split_key
from jax_it.models.experts import ExpertsMlp, Routing
from jax_it.models.fast_attention import attend
from jax_it.models.kv_cache import LayerCache
from jax_it.models.linear import ACTIVATIONS, linear, normal, project, scale_by
from jax_it.models.norm import Norm
from jax_it.models.rope import CosSin, Rope, rotate
from jax_it.sharding import constrain


class Context(NamedTuple):
    """What all layers of a stack read beside their input. When decoding, the mask comes from the cache."""

    options: ComputeOptions
    scores: Scores
    cos_sin: Mapping[Rope | None, CosSin]
    bias_of: Callable[["Layer"], Any]  # gives a layer's relative bias, if it has one; see `fast_attention.attend`
    real_BT: jax.Array  # false for padding, which experts do not count
    mask: Mask | None = None
    encoded_BSD: jax.Array | None = None  # the encoder's states; a source's blocks are rows of their own
    cross_mask: Mask | None = None  # which source positions each position may see


class Attention(nnx.Module):
    """The linear layers of attention; keys and values may be made of states of another width, `kv_dim`."""

    def __init__(self, c: StackConfig, kv_dim: int = 0, *, rngs: nnx.Rngs):
        dim, kv_dims = (c.embed_dim,), (kv_dim or c.embed_dim,)
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        small = c.head_dim**-0.5 if c.relative_bias else 1  # T5 scales no scores: its queries start small instead
        self.query, self.query_bias = linear(rngs, dim, heads, c.attention_bias, scale=small)
        self.key, self.key_bias = linear(rngs, kv_dims, kv_heads, c.attention_bias)
        self.value, self.value_bias = linear(rngs, kv_dims, kv_heads, c.attention_bias)
        self.output, self.output_bias = linear(rngs, heads, dim, c.output_bias)
        first = 1 if c.qk_norm == "head" else 0  # of the axes that the norms are over
        self.query_norm = Norm(c.norm, heads[first:], c.norm_eps) if c.qk_norm else None
        self.key_norm = Norm(c.norm, kv_heads[first:], c.norm_eps) if c.qk_norm else None

    def queries(self, x_BTD: jax.Array, cos_sin: CosSin | None = None) -> jax.Array:
        """Return [B, T, N, H], rotated if `cos_sin` is given."""
        query_BTNH = project(x_BTD, self.query, "BTD,DNH->BTNH", self.query_bias)
        query_BTNH = self.query_norm(query_BTNH) if self.query_norm else query_BTNH
        return constrain(rotate(query_BTNH, cos_sin), "B T N H")

    def keys_values(self, x_BSD: jax.Array, rows: int, cos_sin: CosSin | None = None) -> tuple[jax.Array, jax.Array]:
        """Return both as [rows, S, K, H], keys rotated if `cos_sin` is given."""
        key_BSKH = project(x_BSD, self.key, "BSD,DKH->BSKH", self.key_bias)
        value_BSKH = project(x_BSD, self.value, "BSD,DKH->BSKH", self.value_bias)
        key_BSKH = self.key_norm(key_BSKH) if self.key_norm else key_BSKH
        return gather_kv(rotate(key_BSKH, cos_sin), rows), gather_kv(value_BSKH, rows)

    def output_projection(self, attended_BTNH: jax.Array) -> jax.Array:
        """Return [B, T, D]."""
        return project(attended_BTNH, self.output, "BTNH,NHD->BTD", self.output_bias)


class Mlp(nnx.Module):
    """A feed-forward layer, gated or not."""

    def __init__(self, c: StackConfig, *, rngs: nnx.Rngs):
        self.activation, outer, inner = c.activation, (c.embed_dim,), (c.mlp_dim,)
        gate: Any = linear(rngs, outer, inner, c.mlp_bias) if c.gated_mlp else (None, None)
        self.gate, self.gate_bias = gate
        self.up, self.up_bias = linear(rngs, outer, inner, c.mlp_bias)
        self.down, self.down_bias = linear(rngs, inner, outer, c.mlp_bias)

    def __call__(
        self, x_BTD: jax.Array, rate: float = 0.0, dropout_key: jax.Array | None = None, recompute: bool = False
    ) -> jax.Array:
        """Return [B, T, D]. Dropout acts on the hidden layer."""
        act, up_BTF = ACTIVATIONS[self.activation], project(x_BTD, self.up, "BTD,DF->BTF", self.up_bias)
        gate_BTF = None if self.gate is None else project(x_BTD, self.gate, "BTD,DF->BTF", self.gate_bias)

        def down(up_BTF: jax.Array, gate_BTF: jax.Array | None) -> jax.Array:
            h_BTF = act(up_BTF) if gate_BTF is None else up_BTF * act(gate_BTF)
            h_BTF = dropout(constrain(h_BTF, "B T F"), rate, dropout_key)
            return project(barrier(h_BTF), self.down, "BTF,FD->BTD", self.down_bias)

        # Barriers keep a CPU from computing the activation, or its gradient, within each product's transposing copy.
        barrier = jax.lax.optimization_barrier if recompute else (lambda x: x)
        return (jax.checkpoint(down) if recompute else down)(*barrier((up_BTF, gate_BTF)))


class Layer(nnx.Module):
    """A layer of a stack; `config` says which parts it has."""

    def __init__(self, c: StackConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.attention = Attention(c, rngs=rngs)
        self.cross = Attention(c, c.encoder_dim, rngs=rngs) if c.encoder_dim else None
        self.experts = ExpertsMlp(c.embed_dim, c.experts, c.activation, rngs=rngs) if c.experts else None
        self.mlp: Any = None if c.experts else Mlp(c, rngs=rngs)
        if c.relative_bias and c.relative_bias.per_layer:
            self.relative_bias = normal(rngs, (c.relative_bias.buckets, c.num_heads), c.embed_dim**-0.5)
        for part in ("attention", "cross", "mlp") if self.cross else ("attention", "mlp"):
            if c.norm_placement != "post_norm":
                setattr(self, f"{part}_norm", Norm(c.norm, (c.embed_dim,), c.norm_eps))
            if c.norm_placement in ("post_norm", "sandwich_norm"):
                setattr(self, f"{part}_post_norm", Norm(c.norm, (c.embed_dim,), c.norm_eps))

    def __call__(
        self, x_BTD: jax.Array, context: Context, kind: LayerKind, cache: LayerCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Routing | None]:  # fmt: skip
        """Return the states [B, T, D], the cache, and how experts were chosen, if there are any.

        Without a cache, compute all positions and return the keys and values to cache in its place. With one, the
        positions are added to it: one, or of a causal model several.
        """
        c, rate, keys, routing = self.config, context.options.dropout, split_key(dropout_key, 6), None
        read_BTD = self._norm("attention", x_BTD, context)
        mixed_BTD, kept = MIXERS[kind.mixer](self, read_BTD, context, kind, cache, keys[0])
        h_BTD = self._add("attention", x_BTD, mixed_BTD, rate, keys[1])
        if self.cross:
            attended_BTD = _cross_attend(self.cross, self._norm("cross", h_BTD, context), context, cache, keys[2])
            h_BTD = self._add("cross", h_BTD, attended_BTD, rate, keys[3])
        read_BTD = self._norm("mlp", x_BTD if c.norm_placement == "parallel" else h_BTD, context)
        if self.experts:
            out_BTD, routing = self.experts(read_BTD, context.real_BT)
        else:
            mlp_rate = rate if "mlp" in c.dropout_in else 0.0
            out_BTD = self.mlp(read_BTD, mlp_rate, keys[4], context.options.recompute)
        return self._add("mlp", h_BTD, out_BTD, rate, keys[5]), kept, routing

    def _norm(self, part: str, x_BTD: jax.Array, context: Context) -> jax.Array:
        norm = getattr(self, f"{part}_norm", None)
        if norm and context.options.recompute:
            return jax.checkpoint(lambda x_BTD: norm(x_BTD))(x_BTD)
        return norm(x_BTD) if norm else x_BTD

    def _add(
        self, part: str, x_BTD: jax.Array, added_BTD: jax.Array, rate: float, dropout_key: jax.Array | None
    ) -> jax.Array:
        norm = getattr(self, f"{part}_post_norm", None)
        added_BTD = norm(added_BTD) if norm else added_BTD
        if self.config.residual_scale != 1:
            added_BTD = scale_by(added_BTD, self.config.residual_scale)
        return constrain(x_BTD + dropout(added_BTD, rate, dropout_key), "B T D")


def _self_attend(
    layer: Layer, x_BTD: jax.Array, context: Context, kind: LayerKind, cache: LayerCache | None,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Return the states [B, T, D], and the cache or, without one, keys and values [B, T, K, H]."""
    attention, cos_sin, bias = layer.attention, context.cos_sin.get(kind.rope), context.bias_of(layer)
    query_BTNH, keys_values = attention.queries(x_BTD, cos_sin), attention.keys_values(x_BTD, len(x_BTD), cos_sin)
    if cache is not None:
        cache, cached = cache.add(*keys_values)
        attended_BTNH = attend_to_cache(query_BTNH, cached, context.scores, bias, context.options.recompute)
        return attention.output_projection(attended_BTNH), cache
    assert context.mask
    mask = context.mask._replace(window=kind.window)
    attended_BTNH = attend(
        query_BTNH, *keys_values, context.scores, mask, context.options, bias=bias, dropout_key=dropout_key
    )
    return attention.output_projection(attended_BTNH), keys_values


def _cross_attend(
    cross: Attention, x_BTD: jax.Array, context: Context, cache: LayerCache | None, dropout_key: jax.Array | None
) -> jax.Array:
    query_BTNH = cross.queries(x_BTD)
    if cache is None:
        assert context.encoded_BSD is not None and context.cross_mask
        keys_values = cross.keys_values(context.encoded_BSD, len(x_BTD))
        attended_BTNH = attend(
            query_BTNH, *keys_values, context.scores, context.cross_mask, context.options, dropout_key=dropout_key
        )
        return cross.output_projection(attended_BTNH)
    cached = cache.cross_keys_values
    # The rows that read one source, if several, are taken as its query positions.
    by_source = query_BTNH.reshape(len(cached.mask_BTS), -1, *query_BTNH.shape[2:])
    attended_BTNH = attend_to_cache(by_source, cached, context.scores, None, context.options.recompute)
    return cross.output_projection(attended_BTNH.reshape(query_BTNH.shape))


# How a layer mixes positions, by its kind: (layer, x_BTD, context, kind, cache, dropout_key) -> x_BTD, what is cached.
MIXERS: dict[str, Callable[..., tuple[jax.Array, Any]]] = {"attention": _self_attend}
