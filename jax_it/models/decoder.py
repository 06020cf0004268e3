"""The decoder that causal language models share, and its layers, which T5Gemma is made of; `families/` says how
each of them varies it.

Layers are stacked and scanned. What differs between the layers of one model, such as the window of its
attention, is an array over layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import layers, rope
from jax_it.models.experts import Experts, ExpertsMlp, Routing
from jax_it.models.family import Run
from jax_it.models.layers import Norm, NormKind, attend, split_key
from jax_it.models.linear import dropout, look_up, project
from jax_it.models.rope import Rope
from jax_it.sharding import constrain

# Where a layer's norms stand: before attention and feed-forward, after each, or both. "parallel": before, and
# both read the layer's input.
Placement = Literal["before", "after", "both", "parallel"]

WITHOUT_WINDOW = 1 << 30  # positions

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
        """Matmul FLOPs of the forward pass of one row of `length` positions."""
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
    def varied(self) -> bool:
        """Whether layers differ in their window or rope."""
        return len(set(self.windows)) > 1 or len(set(self.layer_ropes)) > 1


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


class Source(NamedTuple):
    """What cross-attention reads when all positions are computed, and which of it each of them sees."""

    states_BSD: jax.Array
    allowed_BTS: jax.Array


class Memory(NamedTuple):
    """What cross-attention reads in single steps: keys and values of every layer, and each position's segment."""

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array
    segments_BS: jax.Array


class Cache(NamedTuple):
    """Keys and values of the tokens so far, each at its own position; row b holds those before its position.

    With n times as many rows as the memory has sources, row b reads source b // n.
    """

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array
    memory: Memory | None = None


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache whose row b is row `rows_B[b]` of this one. A memory stays, so no row may change its source."""
    return Cache(cache.key_LBSKH[:, rows_B], cache.value_LBSKH[:, rows_B], cache.memory)


class Stack(nnx.Module):
    """A model's layers and the norm after them, from embedded tokens to states."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.layers: Any = layers.stack(lambda rngs: Layer(c, rngs=rngs), c.layers, rngs)
        self.norm = Norm(c.norm, (c.width,), c.epsilon)

    def scan(
        self, x_BTD: jax.Array, positions_BT: jax.Array, real_BT: jax.Array, allowed_BTS: jax.Array, run: Run,
        key: jax.Array | None = None, *, source: Source | None = None, with_cache: bool = False,
    ) -> tuple[jax.Array, Routing | None, Any]:  # fmt: skip
        """Normed states of all positions, the routing summed over layers, and every layer's keys and values."""
        c, length = self.config, x_BTD.shape[1]
        distance_TS = jnp.arange(length)[:, None] - jnp.arange(length)
        if c.bidirectional:
            distance_TS = jnp.abs(distance_TS)
        turns = self._rotations(positions_BT, length)
        first, rest = split_key(key, 2)
        keys = None if rest is None else jax.random.split(rest, c.layers)
        graph, state = nnx.split(self.layers)

        def body(x_BTD: jax.Array, xs: tuple) -> tuple[jax.Array, tuple]:
            state, varied, key = xs
            module = nnx.merge(graph, state)
            (cos, sin), window = self._variation(turns, varied)
            attention_key, layer_key = split_key(key, 2)
            kept: list[jax.Array] = []

            def attention(x_BTD: jax.Array) -> jax.Array:
                query_BTNH, key_BTKH, value_BTKH = _heads(module.attention, x_BTD, cos, sin)
                kept.extend((key_BTKH, value_BTKH))
                attended = attend(
                    query_BTNH, key_BTKH, value_BTKH,
                    mask_BTS=allowed_BTS & (distance_TS < window) if c.windows else allowed_BTS,
                    scale=_score_scale(c), cap=c.score_cap, dropout_rate=run.dropout,
                    dropout_key=attention_key if c.inner_dropout == "attention" else None,
                )  # fmt: skip
                return module.attention.project(attended)

            def cross(x_BTD: jax.Array) -> jax.Array:
                assert source is not None
                return _read(c, module.cross, x_BTD, module.cross.keys_values(source.states_BSD), source.allowed_BTS)

            x_BTD, routing = module(c, x_BTD, attention, cross, real_BT, run.dropout, layer_key)
            return x_BTD, (routing, tuple(kept) if with_cache else None)

        x_BTD = dropout(x_BTD, run.dropout, first)
        xs = (state, self._varied(), keys)
        x_BTD, (routing, cache) = jax.lax.scan(jax.checkpoint(body) if run.remat else body, x_BTD, xs)
        return self.norm(x_BTD), jax.tree.map(lambda layers: layers.sum(0), routing), cache

    def scan_step(self, x_BTD: jax.Array, positions_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Normed states [B, D] of one more token a row, at its own position, and the new cache."""
        c, room, memory = self.config, cache.key_LBSKH.shape[2], cache.memory
        distance_BTS = (positions_B[:, None] - jnp.arange(room))[:, None]
        turns = self._rotations(positions_B[:, None], room)
        rows = jnp.arange(x_BTD.shape[0])
        graph, state = nnx.split(self.layers)

        def body(x_BTD: jax.Array, xs: tuple) -> tuple[jax.Array, tuple]:
            state, varied, keys_BSKH, values_BSKH, source = xs
            module = nnx.merge(graph, state)
            (cos, sin), window = self._variation(turns, varied)
            kept = []

            def attention(x_BTD: jax.Array) -> jax.Array:
                query_BTNH, key_BTKH, value_BTKH = _heads(module.attention, x_BTD, cos, sin)
                kept.append(keys_BSKH.at[rows, positions_B].set(key_BTKH[:, 0]))
                kept.append(values_BSKH.at[rows, positions_B].set(value_BTKH[:, 0]))
                allowed_BTS = (distance_BTS >= 0) & (distance_BTS < window)
                attended = attend(query_BTNH, *kept, mask_BTS=allowed_BTS, scale=_score_scale(c), cap=c.score_cap)
                return module.attention.project(attended)

            def cross(x_BTD: jax.Array) -> jax.Array:
                assert memory is not None
                return _read(c, module.cross, x_BTD, source, memory.segments_BS[:, None] > 0)

            x_BTD, _ = module(c, x_BTD, attention, cross, jnp.ones(x_BTD.shape[:2], bool), 0.0, None)
            return x_BTD, tuple(kept)

        source = memory and (memory.key_LBSKH, memory.value_LBSKH)
        xs = (state, self._varied(), cache.key_LBSKH, cache.value_LBSKH, source)
        x_BTD, (keys, values) = jax.lax.scan(body, x_BTD, xs)
        return self.norm(x_BTD[:, 0]), Cache(keys, values, memory)

    def remember(self, states_BSD: jax.Array, segments_BS: jax.Array) -> Memory:
        """The memory of a source's states: cross-attention's keys and values, made once for all steps."""
        graph, state = nnx.split(self.layers)
        keys, values = jax.lax.map(lambda state: nnx.merge(graph, state).cross.keys_values(states_BSD), state)
        return Memory(keys, values, segments_BS)

    def _rotations(self, positions_BT: jax.Array, length: int) -> Any:
        """Cosines and sines [ropes, B, T, pairs]; None without ropes."""
        if not self.config.ropes:
            return None
        return jax.tree.map(lambda *each: jnp.stack(each), *rope.rotations(self.config.ropes, positions_BT, length))

    def _varied(self) -> Any:
        """What differs between layers, as arrays over them: which rope, and the window."""
        c = self.config
        if not c.varied:
            return None
        windows = [window or WITHOUT_WINDOW for window in c.windows or (0,) * c.layers]
        return jnp.asarray(c.layer_ropes or (0,) * c.layers), jnp.asarray(windows)

    def _variation(self, turns: Any, varied: Any) -> tuple[Any, Any]:
        """A layer's (cosine, sine) and its window."""
        c = self.config
        which, window = varied if varied is not None else (0, (c.windows or (0,))[0] or WITHOUT_WINDOW)
        return (None, None) if turns is None else (turns[0][which], turns[1][which]), window


class Decoder(Stack):
    """A causal language model."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.embedding = layers.normal(rngs, (c.vocabulary, c.width), 0.02 if c.embedding_scale == 1 else c.width**-0.5)
        if c.positions:
            self.positions = layers.normal(rngs, (c.positions, c.width), 0.02)
        if not c.tied:
            self.head = layers.normal(rngs, (c.vocabulary, c.width), c.width**-0.5)
        super().__init__(c, rngs=rngs)

    def __call__(self, batch: Any, run: Run, key: jax.Array | None = None) -> jax.Array:
        """States before the head, [B, T, D], of a CausalBatch; dropout where a key is given."""
        return self.states(batch, run, key)[0]

    def states(self, batch: Any, run: Run, key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """The states, and how the router of a mixture of experts sent the tokens, summed over layers."""
        allowed_BTS = causal_mask(batch.segments_BT, batch.prefix_BT)
        x_BTD = self._embed(batch.tokens_BT, batch.positions_BT, run)
        x_BTD, routing, _ = self.scan(x_BTD, batch.positions_BT, batch.segments_BT > 0, allowed_BTS, run, key)
        return x_BTD, routing

    def prefill(
        self, tokens_BS: jax.Array, segments_BS: jax.Array, length: int, run: Run
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """(last tokens [B], their positions [B], cache) for at most `length` tokens after each prompt.

        The first step takes a prompt's last token, whose state it computes again.
        """
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        prefix_BS = segments_BS if run.prefix_lm else None
        allowed_BTS = causal_mask(segments_BS, prefix_BS)
        x_BSD = self._embed(tokens_BS, positions_BS, run)
        _, _, (keys, values) = self.scan(x_BSD, positions_BS, segments_BS > 0, allowed_BTS, run, with_cache=True)
        room = ((0, 0), (0, 0), (0, length), (0, 0), (0, 0))
        last_B = jnp.maximum((segments_BS > 0).sum(1) - 1, 0)
        first_B = jnp.take_along_axis(tokens_BS, last_B[:, None], axis=1)[:, 0]
        return first_B, last_B, Cache(jnp.pad(keys, room), jnp.pad(values, room))

    def step(self, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache, run: Run) -> tuple[jax.Array, Cache]:
        """States [B, D] after one more token a row, at its own position, and the new cache."""
        return self.scan_step(self._embed(tokens_B[:, None], positions_B[:, None], run), positions_B, cache)

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, run: Run) -> jax.Array:
        x_BTD = embed(self.config, self.embedding, tokens_BT, run.dtype)
        if self.config.positions:
            x_BTD += look_up(self.positions, positions_BT, run.dtype)
        return constrain(x_BTD, "B T D")


def embed(c: Config, embedding: nnx.Param, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """The tokens' rows of an embedding, scaled where the model scales them."""
    x_BTD = look_up(embedding, tokens_BT, dtype)
    if c.embedding_scale != 1:
        x_BTD *= jnp.asarray(c.embedding_scale, dtype)  # rounded to the dtype, as Gemma was trained
    return constrain(x_BTD, "B T D")


def _heads(attention: Attention, x_BTD: jax.Array, cos: Any, sin: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, rotated where the model rotates."""
    query_BTNH, (key_BTKH, value_BTKH) = attention.queries(x_BTD), attention.keys_values(x_BTD)
    if cos is not None:
        query_BTNH, key_BTKH = rope.rotate(query_BTNH, cos, sin), rope.rotate(key_BTKH, cos, sin)
    return constrain(query_BTNH, "B T N H"), constrain(key_BTKH, "B S K H"), constrain(value_BTKH, "B S K H")


def _read(c: Config, cross: Attention, x_BTD: jax.Array, memory: tuple, allowed_BTS: jax.Array) -> jax.Array:
    """Cross-attention to keys and values. The rows of one source, if several, are taken as its query positions."""
    query_BTNH, key_BSKH, value_BSKH = constrain(cross.queries(x_BTD), "B T N H"), *memory
    attended = attend(
        query_BTNH.reshape(key_BSKH.shape[0], -1, *query_BTNH.shape[2:]),
        constrain(key_BSKH, "B S K H"), constrain(value_BSKH, "B S K H"),
        mask_BTS=allowed_BTS, scale=_score_scale(c), cap=c.score_cap,
    )  # fmt: skip
    return cross.project(attended.reshape(query_BTNH.shape))


def _score_scale(c: Config) -> float:
    return c.head_size**-0.5 if c.score_scale is None else c.score_scale


def causal_mask(segments_BT: jax.Array, prefix_BT: jax.Array | None = None) -> jax.Array:
    """Where position t may see s, [B, T, S]: in its segment, not after it, or both in the segment's prefix."""
    length = segments_BT.shape[1]
    seen_BTS = jnp.tri(length, dtype=bool)[None]
    if prefix_BT is not None:
        seen_BTS = seen_BTS | ((prefix_BT[:, :, None] > 0) & (prefix_BT[:, None] > 0))
    return seen_BTS & (segments_BT[:, :, None] == segments_BT[:, None])


def head_logits(c: Config, head_VD: jax.Array, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of states [..., D]."""
    logits = jnp.einsum("...D,VD->...V", hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return c.logit_cap * jnp.tanh(logits / c.logit_cap) if c.logit_cap else logits
