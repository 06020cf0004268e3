"""One transformer layer, for every family: `layer(x, context, kind, cache) -> x, cache, routing`.

Self-attention, cross-attention in an encoder-decoder's decoder, and a feed-forward layer, with a residual around each.
The same code trains and reads prompts (all positions at once, no cache) and decodes (one position a row, with a cache).
`StackConfig` says which of its options a family takes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models.attention import Scores, attend, attend_by_head, gather_kv
from jax_it.models.config import ComputeOptions, LayerKind, StackConfig
from jax_it.models.experts import ExpertsMlp, Routing
from jax_it.models.kv_cache import LayerCache
from jax_it.models.linear import ACTIVATIONS, dropout, normal, project, scale_by, split_key
from jax_it.models.norm import Norm
from jax_it.models.rope import Rope, rotate
from jax_it.sharding import constrain


class EncoderStates(NamedTuple):
    """What cross-attention reads when all target positions are computed at once."""

    states_BSD: jax.Array  # a source's blocks as rows of their own
    mask_BTS: jax.Array  # which source positions each target position may see


class Context(NamedTuple):
    """What every layer of a stack reads beside its input."""

    options: ComputeOptions
    real_BT: jax.Array  # false for padding
    cos_sin: Mapping[Rope, tuple[jax.Array, jax.Array]]
    make_bias: Callable[[jax.Array], jax.Array] | None = None  # a relative bias, of its table [E, N]
    bias: jax.Array | None = None  # the one that all layers share
    # Without a cache:
    mask_BTS: jax.Array | None = None
    segments_BT: jax.Array | None = None
    causal: bool = False  # the mask allows no key after its query
    encoder: EncoderStates | None = None


class Attention(nnx.Module):
    """The linear layers of attention; keys and values may be made of states of another width, `kv_dim`."""

    def __init__(self, c: StackConfig, kv_dim: int = 0, *, rngs: nnx.Rngs):
        dim, queries, keys = c.embed_dim, (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        kv_dim = kv_dim or dim
        # T5 scales no scores: its queries start small instead.
        self.query = normal(rngs, (dim, *queries), dim**-0.5 * (c.head_dim**-0.5 if c.relative_bias else 1))
        self.key = normal(rngs, (kv_dim, *keys), kv_dim**-0.5)
        self.value = normal(rngs, (kv_dim, *keys), kv_dim**-0.5)
        self.output = normal(rngs, (*queries, dim), (c.num_heads * c.head_dim) ** -0.5)
        if c.attention_bias:
            self.query_bias = nnx.Param(jnp.zeros(queries))
            self.key_bias = nnx.Param(jnp.zeros(keys))
            self.value_bias = nnx.Param(jnp.zeros(keys))
        if c.output_bias:
            self.output_bias = nnx.Param(jnp.zeros(dim))
        if c.qk_norm:
            of_head = c.qk_norm == "head"
            self.query_norm = Norm(c.norm, queries[1:] if of_head else queries, c.norm_eps)
            self.key_norm = Norm(c.norm, keys[1:] if of_head else keys, c.norm_eps)

    def queries(self, x_BTD: jax.Array) -> jax.Array:
        """Return [B, T, N, H], before rotation."""
        query_BTNH = _add_bias(project(x_BTD, self.query, "BTD,DNH->BTNH"), self, "query_bias")
        return self.query_norm(query_BTNH) if hasattr(self, "query_norm") else query_BTNH

    def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return both as [B, S, K, H], keys before rotation."""
        key_BSKH = _add_bias(project(x_BSD, self.key, "BSD,DKH->BSKH"), self, "key_bias")
        value_BSKH = _add_bias(project(x_BSD, self.value, "BSD,DKH->BSKH"), self, "value_bias")
        return self.key_norm(key_BSKH) if hasattr(self, "key_norm") else key_BSKH, value_BSKH

    def project(self, x_BTNH: jax.Array) -> jax.Array:
        """Return the states [B, T, D] of what was attended to."""
        return _add_bias(project(x_BTNH, self.output, "BTNH,NHD->BTD"), self, "output_bias")


class Mlp(nnx.Module):
    """A feed-forward layer, gated or not."""

    def __init__(self, c: StackConfig, *, rngs: nnx.Rngs):
        self.activation = c.activation
        if c.gated_mlp:
            self.gate = normal(rngs, (c.embed_dim, c.mlp_dim), c.embed_dim**-0.5)
        self.up = normal(rngs, (c.embed_dim, c.mlp_dim), c.embed_dim**-0.5)
        self.down = normal(rngs, (c.mlp_dim, c.embed_dim), c.mlp_dim**-0.5)
        if c.mlp_bias:
            self.up_bias = nnx.Param(jnp.zeros(c.mlp_dim))
            self.down_bias = nnx.Param(jnp.zeros(c.embed_dim))
            if c.gated_mlp:
                self.gate_bias = nnx.Param(jnp.zeros(c.mlp_dim))

    def __call__(self, x_BTD: jax.Array, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
        """Return [B, T, D]. If a key is given, dropout acts on the hidden layer."""
        act = ACTIVATIONS[self.activation]
        h_BTF = _add_bias(project(x_BTD, self.up, "BTD,DF->BTF"), self, "up_bias")
        if hasattr(self, "gate"):
            h_BTF *= act(_add_bias(project(x_BTD, self.gate, "BTD,DF->BTF"), self, "gate_bias"))
        else:
            h_BTF = act(h_BTF)
        h_BTF = dropout(constrain(h_BTF, "B T F"), rate, key)
        return _add_bias(project(h_BTF, self.down, "BTF,FD->BTD"), self, "down_bias")


class Layer(nnx.Module):
    """A layer of a stack; `config` says which parts it has."""

    def __init__(self, c: StackConfig, *, rngs: nnx.Rngs):
        self.config = c
        sublayers = ["attention", "mlp"]
        self.attention = Attention(c, rngs=rngs)
        if c.encoder_dim:
            sublayers.append("cross")
            self.cross = Attention(c, c.encoder_dim, rngs=rngs)
        if c.experts:
            self.experts = ExpertsMlp(c.embed_dim, c.experts, c.activation, rngs=rngs)
        else:
            self.mlp = Mlp(c, rngs=rngs)
        if c.relative_bias and c.relative_bias.per_layer:
            self.relative_bias = normal(rngs, (c.relative_bias.buckets, c.num_heads), c.embed_dim**-0.5)
        for name in sublayers:
            if c.norm_placement != "post_norm":
                setattr(self, f"{name}_norm", Norm(c.norm, (c.embed_dim,), c.norm_eps))
            if c.norm_placement in ("post_norm", "sandwich_norm"):
                setattr(self, f"{name}_post_norm", Norm(c.norm, (c.embed_dim,), c.norm_eps))

    def __call__(
        self, x_BTD: jax.Array, context: Context, kind: LayerKind, cache: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Routing | None]:  # fmt: skip
        """Return the states [B, T, D], the cache, and how experts were chosen, if there are any.

        Without a cache all positions are computed, and what is returned for it are their keys and values, both
        [B, T, K, H]. With one, T is 1: the position is added to the cache. A key is for dropout.
        """
        c, rate, keys = self.config, context.options.dropout, split_key(key, 6)
        in_attention, in_mlp = ("attention" in c.dropout_in), ("mlp" in c.dropout_in)
        scores = Scores(c.scale, c.attn_logit_softcap, rate if in_attention else 0.0)
        added_BTD, kept = self._attend(self._pre_norm("attention", x_BTD), context, kind, cache, scores, keys[0])
        h_BTD = self._add("attention", x_BTD, added_BTD, rate, keys[1])
        if c.encoder_dim:
            added_BTD = self._cross_attend(self._pre_norm("cross", h_BTD), context, cache, scores, keys[2])
            h_BTD = self._add("cross", h_BTD, added_BTD, rate, keys[3])
        read_BTD = self._pre_norm("mlp", x_BTD if c.norm_placement == "parallel" else h_BTD)
        routing = None
        if c.experts:
            added_BTD, routing = self.experts(read_BTD, context.real_BT)
        else:
            added_BTD = self.mlp(read_BTD, rate, keys[4] if in_mlp else None)
        return self._add("mlp", h_BTD, added_BTD, rate, keys[5]), kept, routing

    def _attend(
        self, x_BTD: jax.Array, context: Context, kind: LayerKind, cache: LayerCache | None, scores: Scores,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        attention, rows = self.attention, x_BTD.shape[0]
        query_BTNH, (key_BTKH, value_BTKH) = attention.queries(x_BTD), attention.keys_values(x_BTD)
        if kind.rope:
            cos_BTP, sin_BTP = context.cos_sin[kind.rope]
            interleaved = kind.rope.interleaved
            query_BTNH = rotate(query_BTNH, cos_BTP, sin_BTP, interleaved)
            key_BTKH = rotate(key_BTKH, cos_BTP, sin_BTP, interleaved)
        query_BTNH = constrain(query_BTNH, "B T N H")
        key_BTKH, value_BTKH = gather_kv(key_BTKH, rows), gather_kv(value_BTKH, rows)
        bias = context.bias
        if hasattr(self, "relative_bias"):
            assert context.make_bias is not None
            bias = context.make_bias(self.relative_bias[...])
        if cache is None:
            assert context.mask_BTS is not None
            attended_BTNH = attend(
                query_BTNH, key_BTKH, value_BTKH, scores, mask_BTS=context.mask_BTS, segments_BT=context.segments_BT,
                causal=context.causal, window=kind.window, fused=context.options.fused, bias=bias, key=key,
            )  # fmt: skip
            return attention.project(attended_BTNH), (key_BTKH, value_BTKH)
        cache = cache.write(key_BTKH, value_BTKH)
        attended_BTNH = attend_by_head(query_BTNH, *cache.keys_values, scores, cache.mask(), bias)
        return attention.project(attended_BTNH), cache

    def _cross_attend(
        self, x_BTD: jax.Array, context: Context, cache: Any, scores: Scores, key: jax.Array | None
    ) -> jax.Array:
        query_BTNH = constrain(self.cross.queries(x_BTD), "B T N H")
        if context.encoder is not None:
            states_BSD, mask_BTS = context.encoder
            key_BSKH, value_BSKH = (gather_kv(x, x_BTD.shape[0]) for x in self.cross.keys_values(states_BSD))
            attended_BTNH = attend(query_BTNH, key_BSKH, value_BSKH, scores, mask_BTS=mask_BTS, key=key)
            return self.cross.project(attended_BTNH)
        # The rows that read one source, if several, are taken as its query positions.
        mask_BTS = cache.source_segments_BS[:, None] > 0
        by_source = query_BTNH.reshape(len(mask_BTS), -1, *query_BTNH.shape[2:])
        key_BKHS, value_BKSH = cache.cross_keys_values
        attended_BTNH = attend_by_head(by_source, key_BKHS, value_BKSH, scores, mask_BTS)
        return self.cross.project(attended_BTNH.reshape(query_BTNH.shape))

    def _pre_norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        norm = getattr(self, f"{name}_norm", None)
        return norm(x_BTD) if norm else x_BTD

    def _add(self, name: str, x_BTD: jax.Array, added_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        norm = getattr(self, f"{name}_post_norm", None)
        added_BTD = norm(added_BTD) if norm else added_BTD
        if self.config.residual_scale != 1:
            added_BTD = scale_by(added_BTD, self.config.residual_scale)
        return constrain(x_BTD + dropout(added_BTD, rate, key), "B T D")


def _add_bias(x: jax.Array, module: nnx.Module, name: str) -> jax.Array:
    """Return `x` plus the module's bias of this name, if it has one."""
    return x + getattr(module, name)[...].astype(x.dtype) if hasattr(module, name) else x
