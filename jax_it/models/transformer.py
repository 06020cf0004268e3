"""A layer of the models that are built on one decoder: its settings, attention, feed-forward and norms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import layers
from jax_it.models.experts import Experts, ExpertsMlp, Routing
from jax_it.models.layers import Norm, NormKind, split_key
from jax_it.models.linear import dropout, project
from jax_it.models.rope import Rope
from jax_it.sharding import constrain

# Where a layer's norms stand: before attention and feed-forward, after each, or both. "parallel": before, and
# both read the layer's input.
Placement = Literal["before", "after", "both", "parallel"]

Mix = Callable[[jax.Array], jax.Array]  # of states [B, T, D]


@dataclass(frozen=True)
class Config:
    """What of a `config.json` the computation depends on."""

    model_type: str
    vocabulary: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # N
    key_heads: int  # K
    head_size: int  # H
    feed_forward: int  # F
    activation: str
    epsilon: float
    tied: bool  # the head is the embedding
    end_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    start_token: int | None = None  # "beginning of text"
    gated: bool = True  # the feed-forward layer
    norm: NormKind = "rms"
    placement: Placement = "before"
    head_norm: Literal["", "each", "all"] = ""  # of queries and keys: of each head's, or of all heads' together
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False
    mlp_bias: bool = False
    positions: int = 0  # P, learned ones; 0: rotary
    ropes: tuple[Rope | None, ...] = ()  # the different ones
    layer_ropes: tuple[int, ...] = ()  # of each layer, which of them; empty: the first
    computed_again: bool = False  # the whole text, once it is longer than LongRoPE's original length
    windows: tuple[int, ...] = ()  # of each layer, how many positions a token sees; 0: all; empty: all
    bidirectional: bool = False  # an encoder's; a window then is as wide to either side, the token itself in both
    memory_width: int = 0  # of the states that cross-attention reads; 0: there is none
    score_scale: float | None = None  # of attention; None: H ** -0.5
    score_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    dropout: float = 0.0
    inner_dropout: Literal["attention", "mlp"] = "attention"  # where dropout acts beside embeddings and residuals
    experts: Experts | None = None

    def flops(self, source_length: int, length: int, source_blocks: int = 0) -> float:
        """Matmul FLOPs of the forward pass of one row of `length` positions, those of masked scores among them."""
        return self.stack_flops(length) + length * 2 * self.width * self.vocabulary

    def stack_flops(self, length: int, memory: int = 0) -> float:
        """Those without the head, of a row whose cross-attention reads `memory` positions."""
        attention = 2 * self.width * self.head_size * (2 * self.heads + 2 * self.key_heads)
        score = 4 * self.heads * self.head_size
        mlp = 2 * self.width * self.feed_forward * (3 if self.gated else 2)
        if self.experts:
            each = 6 * self.width * self.experts.feed_forward
            mlp = 2 * self.width * self.experts.number + self.experts.per_token * each
        cross = 0
        if self.memory_width:
            cross = memory * 4 * self.memory_width * self.key_heads * self.head_size
            cross += length * (4 * self.width * self.heads * self.head_size + memory * score)
        return self.layers * (length * (attention + length * score + mlp) + cross)

    def scores(self, source_length: int, length: int, source_blocks: int = 0) -> float:
        """How many attention scores a row's forward pass makes, over all heads and layers."""
        memory = source_blocks * source_length if self.memory_width else 0
        return self.layers * self.heads * length * (length + memory)

    @property
    def original_length(self) -> int:
        """The length of texts beyond which LongRoPE rotates positions by other frequencies; 0 without it."""
        return max((rope.original_length for rope in self.ropes if rope is not None), default=0)


class Attention(nnx.Module):
    """The linear layers of attention; what keys and values are made of may have another width, `memory_width`."""

    def __init__(self, c: Config, memory_width: int = 0, *, rngs: nnx.Rngs):
        width, queries, keys = c.width, (c.heads, c.head_size), (c.key_heads, c.head_size)
        self.query = layers.normal(rngs, (width, *queries), width**-0.5)
        width = memory_width or width
        self.key = layers.normal(rngs, (width, *keys), width**-0.5)
        self.value = layers.normal(rngs, (width, *keys), width**-0.5)
        self.output = layers.normal(rngs, (*queries, c.width), (c.heads * c.head_size) ** -0.5)
        if c.attention_bias:
            self.query_bias = nnx.Param(jnp.zeros(queries))
            self.key_bias = nnx.Param(jnp.zeros(keys))
            self.value_bias = nnx.Param(jnp.zeros(keys))
        if c.output_bias:
            self.output_bias = nnx.Param(jnp.zeros(c.width))
        if c.head_norm:
            each = c.head_norm == "each"
            self.query_norm = Norm(c.norm, queries[1:] if each else queries, c.epsilon)
            self.key_norm = Norm(c.norm, keys[1:] if each else keys, c.epsilon)

    def queries(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, N, H], before rotation."""
        query_BTNH = _add(project(x_BTD, self.query, "BTD,DNH->BTNH"), self, "query_bias")
        return self.query_norm(query_BTNH) if hasattr(self, "query_norm") else query_BTNH

    def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both [B, S, K, H], keys before rotation."""
        key_BSKH = _add(project(x_BSD, self.key, "BSD,DKH->BSKH"), self, "key_bias")
        value_BSKH = _add(project(x_BSD, self.value, "BSD,DKH->BSKH"), self, "value_bias")
        return self.key_norm(key_BSKH) if hasattr(self, "key_norm") else key_BSKH, value_BSKH

    def project(self, x_BTNH: jax.Array) -> jax.Array:
        return _add(project(x_BTNH, self.output, "BTNH,NHD->BTD"), self, "output_bias")


class Mlp(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.activation = c.activation
        if c.gated:
            self.gate = layers.normal(rngs, (c.width, c.feed_forward), c.width**-0.5)
        self.up = layers.normal(rngs, (c.width, c.feed_forward), c.width**-0.5)
        self.down = layers.normal(rngs, (c.feed_forward, c.width), c.feed_forward**-0.5)
        if c.mlp_bias:
            if c.gated:
                self.gate_bias = nnx.Param(jnp.zeros(c.feed_forward))
            self.up_bias = nnx.Param(jnp.zeros(c.feed_forward))
            self.down_bias = nnx.Param(jnp.zeros(c.width))

    def __call__(self, x_BTD: jax.Array, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
        """Dropout, where a key is given, acts on the hidden layer."""
        act = layers.ACTIVATIONS[self.activation]
        h_BTF = _add(project(x_BTD, self.up, "BTD,DF->BTF"), self, "up_bias")
        if hasattr(self, "gate"):
            h_BTF *= act(_add(project(x_BTD, self.gate, "BTD,DF->BTF"), self, "gate_bias"))
        else:
            h_BTF = act(h_BTF)
        h_BTF = dropout(constrain(h_BTF, "B T F"), rate, key)
        return _add(project(h_BTF, self.down, "BTF,FD->BTD"), self, "down_bias")


def _add(x: jax.Array, module: nnx.Module, name: str) -> jax.Array:
    """`x` plus the module's bias of this name, if it has one."""
    return x + getattr(module, name)[...].astype(x.dtype) if hasattr(module, name) else x


class Layer(nnx.Module):
    """Attention, cross-attention in an encoder-decoder's decoder, and a feed-forward layer; residuals around each."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        parts = ["attention", "mlp"]
        self.attention = Attention(c, rngs=rngs)
        if c.memory_width:
            parts.append("cross")
            self.cross = Attention(c, c.memory_width, rngs=rngs)
        if c.experts:
            self.experts = ExpertsMlp(c.width, c.experts, c.activation, rngs=rngs)
        else:
            self.mlp = Mlp(c, rngs=rngs)
        for part in parts:
            if c.placement != "after":
                setattr(self, f"{part}_norm", Norm(c.norm, (c.width,), c.epsilon))
            if c.placement in ("after", "both"):
                setattr(self, f"{part}_post_norm", Norm(c.norm, (c.width,), c.epsilon))

    def __call__(
        self, c: Config, x_BTD: jax.Array, attention: Mix, cross: Mix, real_BT: jax.Array,
        rate: float, key: jax.Array | None,
    ) -> tuple[jax.Array, Routing | None]:  # fmt: skip
        """The layer's output. `attention` and `cross` say what the positions read of each other and of the source."""
        keys = split_key(key, 4)
        middle_BTD = self._add("attention", x_BTD, attention(self._before("attention", x_BTD)), rate, keys[0])
        if c.memory_width:
            middle_BTD = self._add("cross", middle_BTD, cross(self._before("cross", middle_BTD)), rate, keys[1])
        read_BTD = self._before("mlp", x_BTD if c.placement == "parallel" else middle_BTD)
        routing = None
        if c.experts:
            added_BTD, routing = self.experts(read_BTD, real_BT)
        else:
            added_BTD = self.mlp(read_BTD, rate, keys[2] if c.inner_dropout == "mlp" else None)
        return self._add("mlp", middle_BTD, added_BTD, rate, keys[3]), routing

    def _before(self, part: str, x_BTD: jax.Array) -> jax.Array:
        norm = getattr(self, f"{part}_norm", None)
        return norm(x_BTD) if norm else x_BTD

    def _add(self, part: str, x_BTD: jax.Array, added_BTD: jax.Array, rate: float, key: Any) -> jax.Array:
        norm = getattr(self, f"{part}_post_norm", None)
        added_BTD = norm(added_BTD) if norm else added_BTD
        return constrain(x_BTD + dropout(added_BTD, rate, key), "B T D")
