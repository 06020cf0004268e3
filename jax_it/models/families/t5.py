"""T5 and its relatives, with the layout of their weights in Transformers' checkpoints.

One module covers T5 1.0 (ReLU, tied head), T5 1.1, LM-adapted T5, Flan-T5 and UL2 (gated, untied),
mT5, ByT5, and umT5 (a relative-position bias in every layer). Sources: Raffel et al. 2020 and the
PyTorch models of Transformers 5, whose logits the tests reproduce.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models import layers
from jax_it.models.cache import Cache, Step, nothing, remember, room, write
from jax_it.models.family import Family, Run
from jax_it.models.layers import attend, attend_cached, rms_norm, split_key
from jax_it.models.linear import dropout, look_up, project
from jax_it.models.settings import Settings
from jax_it.models.weights import Weight
from jax_it.sharding import constrain


@dataclass(frozen=True)
class Config:
    """What of a `config.json` the computation depends on."""

    model_type: str
    vocabulary: int  # V
    width: int  # D
    head_size: int  # H
    heads: int  # N
    feed_forward: int  # F
    encoder_layers: int  # L
    decoder_layers: int  # L
    buckets: int  # E
    max_distance: int
    activation: str
    gated: bool
    epsilon: float
    dropout: float
    tied: bool  # the head is the embedding
    scaled: bool  # the decoder's output is multiplied by D ** -0.5 before the head
    bias_everywhere: bool  # every layer has its own relative-position bias, not the first alone
    start_token: int
    pad_token: int
    end_tokens: tuple[int, ...]
    experts: None = None
    positions: int = 0  # learned ones

    def flops(self, source_length: int, target_length: int, source_blocks: int = 1) -> float:
        """Matmul FLOPs of one row's forward pass: `source_blocks` blocks of `source_length`, one target row.

        Those of masked scores are among them, as is custom.
        """
        inner = self.heads * self.head_size
        projection = 2 * self.width * inner
        feed_forward = 2 * self.width * self.feed_forward * (3 if self.gated else 2)
        source, target = source_blocks * source_length, target_length
        encoder = source * (4 * projection + feed_forward + 4 * source_length * inner)
        cross = source * 2 * projection + target * (2 * projection + 4 * source * inner)
        decoder = target * (4 * projection + feed_forward + 4 * target * inner) + cross
        head = target * 2 * self.width * self.vocabulary
        return self.encoder_layers * encoder + self.decoder_layers * decoder + head

    def scores(self, source_length: int, target_length: int, source_blocks: int = 1) -> float:
        """How many attention scores a row's forward pass makes, over all heads and layers."""
        source, target = source_blocks * source_length, target_length
        encoder = self.encoder_layers * source * source_length
        return self.heads * (encoder + self.decoder_layers * target * (source + target))


def read_config(values: Mapping[str, Any], where: str) -> Config:
    """The config of a T5-like `config.json`. A value that is not implemented is a UserError."""
    settings = Settings(values, where)
    kind = settings.choose("model_type", ["t5", "mt5", "umt5"])
    projection = settings.get("feed_forward_proj", str, "relu" if kind == "t5" else "gated-gelu")
    activation = projection.removeprefix("gated-")
    if projection == "gated-gelu":
        activation = "gelu_new"  # Transformers' reading of this name
    if activation not in layers.ACTIVATIONS:
        settings.refuse("feed_forward_proj", [*layers.ACTIVATIONS, *(f"gated-{a}" for a in layers.ACTIVATIONS)])
    encoder_layers = settings.size("num_layers", 6 if kind == "t5" else 8)
    tie = settings.get("tie_word_embeddings", bool, True)
    # Transformers 5 lets `tie_word_embeddings` decide T5's scaling, never scales mT5 and always umT5.
    scaled = settings.get("scale_decoder_outputs", bool, tie is not False)
    settings.expect(is_encoder_decoder=True, is_decoder=False, chunk_size_feed_forward=0)
    settings.expect(is_gated_act=projection.startswith("gated-"), dense_act_fn=activation)  # written beside it
    buckets = settings.size("relative_attention_num_buckets", 32)
    if buckets < 4 or buckets % 2:
        raise settings.bad(
            "relative_attention_num_buckets",
            "it must be an even number, at least 4: in the encoder each side has half",
        )
    max_distance = settings.size("relative_attention_max_distance", 128)
    if max_distance <= buckets // 2:
        raise settings.bad(
            "relative_attention_max_distance",
            f"it must be above {buckets // 2}, half of relative_attention_num_buckets, which are of one distance each",
        )
    vocabulary = settings.size("vocab_size", 32128 if kind == "t5" else 250112)
    pad = settings.get_token("pad_token_id", vocabulary) or 0
    start = settings.get_token("decoder_start_token_id", vocabulary)
    config = Config(
        model_type=kind,
        vocabulary=vocabulary,
        width=settings.size("d_model", 512),
        head_size=settings.size("d_kv", 64),
        heads=settings.size("num_heads", 8 if kind == "t5" else 6),
        feed_forward=settings.size("d_ff", 2048 if kind == "t5" else 1024),
        encoder_layers=encoder_layers,
        decoder_layers=settings.size("num_decoder_layers", encoder_layers),
        buckets=buckets,
        max_distance=max_distance,
        activation=activation,
        gated=projection.startswith("gated-"),
        epsilon=settings.positive("layer_norm_epsilon", 1e-6),
        dropout=settings.rate("dropout_rate", 0.1),
        tied=tie,
        scaled={"t5": scaled, "mt5": False, "umt5": True}[kind],
        bias_everywhere=kind == "umt5",
        start_token=pad if start is None else start,
        pad_token=pad,
        end_tokens=settings.get_tokens("eos_token_id", vocabulary) or (1,),
    )
    settings.finish(
        ignored=("initializer_factor", "classifier_dropout", "scalable_attention")
    )  # the last: umT5's, dead
    return config


def weight_table(c: Config) -> dict[str, Weight]:
    """Our path -> its axes, and the name and layout of the same weight in Transformers."""
    table = {"embedding": Weight("V D", "shared.weight", "V D")}
    if not c.tied:
        table["head"] = Weight("V D", "lm_head.weight", "V D")
    for stack, cross in (("encoder", False), ("decoder", True)):
        block = f"{stack}.block.{{L}}.layer"
        table |= _attention_weights(f"{stack}.layers.attention", f"{block}.0", "SelfAttention")
        if cross:
            table |= _attention_weights(f"{stack}.layers.cross", f"{block}.1", "EncDecAttention")
        ours, theirs = f"{stack}.layers.mlp", f"{block}.{2 if cross else 1}"
        table[f"{ours}.norm"] = Weight("L D", f"{theirs}.layer_norm.weight", "D")
        up = ("wi_0", "wi_1") if c.gated else ("wi",)
        for path, name in zip(("up", "linear"), up, strict=False):
            table[f"{ours}.{path}"] = Weight("L D F", f"{theirs}.DenseReluDense.{name}.weight", "F D")
        table[f"{ours}.down"] = Weight("L F D", f"{theirs}.DenseReluDense.wo.weight", "D F")
        bias = "SelfAttention.relative_attention_bias.weight"
        if c.bias_everywhere:
            table[f"{stack}.layers.bias"] = Weight("L E N", f"{block}.0.{bias}", "E N")
        else:
            table[f"{stack}.bias"] = Weight("E N", f"{stack}.block.0.layer.0.{bias}", "E N")
        table[f"{stack}.norm"] = Weight("D", f"{stack}.final_layer_norm.weight", "D")
    return table


def _attention_weights(ours: str, theirs: str, name: str) -> dict[str, Weight]:
    table = {f"{ours}.norm": Weight("L D", f"{theirs}.layer_norm.weight", "D")}
    for path, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        table[f"{ours}.{path}"] = Weight("L D N H", f"{theirs}.{name}.{letter}.weight", "(N H) D")
    table[f"{ours}.output"] = Weight("L N H D", f"{theirs}.{name}.o.weight", "D (N H)")
    return table


def values_to_save(c: Config) -> dict[str, Any]:
    """The config.json values that decide between tied and untied, scaled and not, in old and new Transformers."""
    values: dict[str, Any] = {"decoder_start_token_id": c.start_token}
    if c.model_type == "t5":
        values |= {"tie_word_embeddings": c.scaled, "scale_decoder_outputs": c.scaled}
    return values


class Attention(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.norm = nnx.Param(jnp.ones(c.width))
        heads = (c.width, c.heads, c.head_size)
        self.query = layers.normal(rngs, heads, (c.width * c.head_size) ** -0.5)
        self.key = layers.normal(rngs, heads, c.width**-0.5)
        self.value = layers.normal(rngs, heads, c.width**-0.5)
        self.output = layers.normal(rngs, (c.heads, c.head_size, c.width), (c.heads * c.head_size) ** -0.5)

    def queries(self, x_BTD: jax.Array) -> jax.Array:
        return project(x_BTD, self.query, "BTD,DNH->BTNH")

    def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return project(x_BSD, self.key, "BSD,DNH->BSNH"), project(x_BSD, self.value, "BSD,DNH->BSNH")

    def project(self, x_BTNH: jax.Array) -> jax.Array:
        return project(x_BTNH, self.output, "BTNH,NHD->BTD")


class Mlp(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.norm = nnx.Param(jnp.ones(c.width))
        self.up = layers.normal(rngs, (c.width, c.feed_forward), c.width**-0.5)
        if c.gated:
            self.linear = layers.normal(rngs, (c.width, c.feed_forward), c.width**-0.5)
        self.down = layers.normal(rngs, (c.feed_forward, c.width), c.feed_forward**-0.5)

    def __call__(self, c: Config, x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        h_BTF = layers.ACTIVATIONS[c.activation](project(x_BTD, self.up, "BTD,DF->BTF"))
        if c.gated:
            h_BTF *= project(x_BTD, self.linear, "BTD,DF->BTF")
        return project(dropout(constrain(h_BTF, "B T F"), rate, key), self.down, "BTF,FD->BTD")


class Layer(nnx.Module):
    """Pre-norm self-attention, cross-attention in the decoder, feed-forward; residuals around each."""

    def __init__(self, c: Config, cross: bool, *, rngs: nnx.Rngs):
        self.attention = Attention(c, rngs=rngs)
        if cross:
            self.cross = Attention(c, rngs=rngs)
        self.mlp = Mlp(c, rngs=rngs)
        if c.bias_everywhere:
            self.bias = layers.normal(rngs, (c.buckets, c.heads), c.width**-0.5)


class Stack(nnx.Module):
    def __init__(self, c: Config, cross: bool, *, rngs: nnx.Rngs):
        number = c.decoder_layers if cross else c.encoder_layers
        self.layers: Any = layers.stack(lambda rngs: Layer(c, cross, rngs=rngs), number, rngs)
        self.norm = nnx.Param(jnp.ones(c.width))
        if not c.bias_everywhere:
            self.bias = layers.normal(rngs, (c.buckets, c.heads), c.width**-0.5)

    def make_bias(self, make: Callable[[jax.Array], jax.Array]) -> Callable[[Layer], jax.Array]:
        """A function from a layer to its attention bias, which `make` makes of a table [E, N]; a shared one once."""
        if not hasattr(self, "bias"):
            return lambda layer: make(layer.bias[...])
        shared = make(self.bias[...])
        return lambda layer: shared


class T5(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embedding = layers.normal(rngs, (c.vocabulary, c.width), 1.0)
        if not c.tied:
            self.head = layers.normal(rngs, (c.vocabulary, c.width), c.width**-0.5)
        self.encoder = Stack(c, cross=False, rngs=rngs)
        self.decoder = Stack(c, cross=True, rngs=rngs)

    def __call__(self, batch: Any, run: Run, key: jax.Array | None = None) -> jax.Array:
        """Decoder states before the head, [B, T, D], of a Seq2SeqBatch; dropout where a key is given."""
        encoder_key, decoder_key = split_key(key, 2)
        encoded_BSD = self.encode(batch.source_BGS, batch.source_segments_BGS, run, encoder_key)
        segments_BS = batch.source_segments_BGS.reshape(batch.source_BGS.shape[0], -1)
        return self.decode(batch.tokens_BT, batch.segments_BT, encoded_BSD, segments_BS, run, decoder_key)

    def embed(self, tokens_BT: jax.Array, run: Run) -> jax.Array:
        return constrain(look_up(self.embedding, tokens_BT, run.dtype), "B T D")

    def encode(
        self, source_BGS: jax.Array, segments_BGS: jax.Array, run: Run, key: jax.Array | None = None
    ) -> jax.Array:
        """The encoder's states, [B * G, S, D]. A token attends within its block and segment."""
        c, length = self.config, source_BGS.shape[-1]
        segments_BS = segments_BGS.reshape(-1, length)
        mask_BTS = constrain(segments_BS[:, :, None] == segments_BS[:, None, :], "B T S")
        bias_of = self.encoder.make_bias(lambda table_EN: _relative_bias(c, table_EN, length, bidirectional=True))

        def layer(x_BTD: jax.Array, module: Layer, key: jax.Array | None) -> jax.Array:
            keys = split_key(key, 5)
            x_BTD = _attention(c, x_BTD, module.attention, None, mask_BTS, bias_of(module), run, keys[:2])
            return _feed_forward(c, x_BTD, module.mlp, run, keys[3:])

        first, last, scan = split_key(key, 3)
        x_BTD = self.embed(source_BGS.reshape(-1, length), run)
        x_BTD = _scan_layers(
            self.encoder.layers, dropout(x_BTD, run.dropout, first), layer, c.encoder_layers, run, scan
        )
        return dropout(rms_norm(x_BTD, self.encoder.norm[...], c.epsilon), run.dropout, last)

    def decode(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        encoded_BSD: jax.Array,
        source_segments_BS: jax.Array,
        run: Run,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The decoder's states, [B, T, D], all positions at once; a source's blocks are rows of `encoded_BSD`."""
        c, length = self.config, tokens_BT.shape[1]
        cross_BTS = segments_BT[:, :, None] == source_segments_BS[:, None, :]
        mask_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & jnp.tri(length, dtype=bool)
        bias_of = self.decoder.make_bias(lambda table_EN: _relative_bias(c, table_EN, length, bidirectional=False))

        def layer(x_BTD: jax.Array, module: Layer, key: jax.Array | None) -> jax.Array:
            keys = split_key(key, 6)
            x_BTD = _attention(c, x_BTD, module.attention, None, mask_BTS, bias_of(module), run, keys[:2], causal=True)
            x_BTD = _attention(c, x_BTD, module.cross, encoded_BSD, cross_BTS, None, run, keys[2:4])
            return _feed_forward(c, x_BTD, module.mlp, run, keys[4:])

        first, last, scan = split_key(key, 3)
        x_BTD = dropout(self.embed(tokens_BT, run), run.dropout, first)
        x_BTD = _scan_layers(self.decoder.layers, x_BTD, layer, c.decoder_layers, run, scan)
        return dropout(rms_norm(x_BTD, self.decoder.norm[...], c.epsilon), run.dropout, last)

    def prefill(
        self, source_BS: jax.Array, source_segments_BS: jax.Array, length: int, run: Run
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """(start tokens [B], their positions [B], cache) for at most `length` target tokens of each source.

        Cross-attention's keys are made once.
        """
        c = self.config
        encoded_BSD = self.encode(source_BS[:, None], source_segments_BS[:, None], run)
        memory = remember(self.decoder.layers, encoded_BSD, source_segments_BS)
        empty = nothing(c.decoder_layers, source_BS.shape[0], c.heads, c.head_size, length, run.dtype)
        first_B = jnp.full(source_BS.shape[0], c.start_token, jnp.int32)
        return first_B, jnp.zeros_like(first_B), Cache(*empty, memory)

    def stepper(self, run: Run) -> Step:
        """The decoder's states [B, D] after one more token a row, at its own position, and the new cache."""
        c = self.config

        def step(tokens_B: jax.Array, positions_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            memory = cache.memory
            assert memory is not None
            distance_BS = jnp.arange(room(cache)) - positions_B[:, None]
            cross_BTS = memory.segments_BS[:, None] > 0
            buckets_BS = _buckets(c, distance_BS, bidirectional=False)
            bias_of = self.decoder.make_bias(lambda table_EN: jnp.moveaxis(table_EN[buckets_BS], -1, 1)[:, :, None])

            def layer(carry: tuple, number: Any, module: Any) -> tuple:
                x_BTD, keys, values = carry
                normed = rms_norm(x_BTD, module.attention.norm[...], c.epsilon)
                # Carried along and written in place: a cache that is read and returned by layers would be copied.
                keys, values = write(keys, values, number, positions_B, *module.attention.keys_values(normed))
                attended = attend_cached(
                    module.attention.queries(normed), keys[number], values[number],
                    mask_BTS=(distance_BS <= 0)[:, None], bias=bias_of(module),
                )  # fmt: skip
                x_BTD += module.attention.project(attended)
                normed = rms_norm(x_BTD, module.cross.norm[...], c.epsilon)
                queries = module.cross.queries(normed)  # the rows of one source, as its query positions
                source = memory.key_LBKHS[number], memory.value_LBKSH[number]
                by_source = queries.reshape(source[0].shape[0], -1, *queries.shape[2:])
                attended = attend_cached(by_source, *source, mask_BTS=cross_BTS)
                x_BTD += module.cross.project(attended.reshape(queries.shape))
                return _feed_forward(c, x_BTD, module.mlp, run, [None, None]), keys, values

            start = (self.embed(tokens_B[:, None], run), cache.key_LBKHT, cache.value_LBKTH)
            x_BTD, keys, values = layers.in_order(self.decoder.layers, layer, start)
            normed_BD = rms_norm(x_BTD[:, 0], self.decoder.norm[...], c.epsilon)
            return normed_BD, cache._replace(key_LBKHT=keys, value_LBKTH=values)

        return step


def head_logits(c: Config, head_VD: jax.Array, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of decoder states [..., D]."""
    if c.scaled:
        hidden = hidden * jnp.asarray(c.width**-0.5, hidden.dtype)
    head_VD = head_VD.astype(hidden.dtype)
    return jnp.einsum("...D,VD->...V", hidden, head_VD, preferred_element_type=jnp.float32)


def _buckets(c: Config, distance: jax.Array, *, bidirectional: bool) -> jax.Array:
    return layers.relative_buckets(
        distance, bidirectional=bidirectional, buckets=c.buckets, max_distance=c.max_distance
    )


def _relative_bias(c: Config, table_EN: jax.Array, length: int, *, bidirectional: bool) -> jax.Array:
    """The bias [N, T, S] of a square of positions; float32."""
    distance = layers.toeplitz_distances(length)
    chosen_WE = jax.nn.one_hot(_buckets(c, distance, bidirectional=bidirectional), c.buckets)
    values_WN = jnp.matmul(chosen_WE, table_EN, precision=jax.lax.Precision.HIGHEST)  # picks, and must not round
    return layers.toeplitz(values_WN.T, length)


def _attention(
    c: Config,
    x_BTD: jax.Array,
    module: Attention,
    memory_BSD: jax.Array | None,
    mask_BTS: jax.Array,
    bias: jax.Array | None,
    run: Run,
    keys: list,
    causal: bool = False,
) -> jax.Array:
    """`x` plus its attention to itself, or to `memory` where that is given."""
    normed_BTD = rms_norm(x_BTD, module.norm[...], c.epsilon)
    key_BSNH, value_BSNH = module.keys_values(normed_BTD if memory_BSD is None else memory_BSD)
    attended_BTNH = attend(
        constrain(module.queries(normed_BTD), "B T N H"),
        layers.keys_of_all(key_BSNH, x_BTD.shape[0]),
        layers.keys_of_all(value_BSNH, x_BTD.shape[0]),
        mask_BTS=mask_BTS,
        causal=causal,
        bias=bias,
        dropout_rate=run.dropout,
        dropout_key=keys[0],
    )
    return constrain(x_BTD + dropout(module.project(attended_BTNH), run.dropout, keys[1]), "B T D")


def _feed_forward(c: Config, x_BTD: jax.Array, module: Mlp, run: Run, keys: list) -> jax.Array:
    normed_BTD = rms_norm(x_BTD, module.norm[...], c.epsilon)
    added_BTD = module(c, normed_BTD, run.dropout, keys[0])
    return constrain(x_BTD + dropout(added_BTD, run.dropout, keys[1]), "B T D")


def _scan_layers(stacked: Any, x_BTD: jax.Array, layer: Any, number: int, run: Run, key: jax.Array | None) -> jax.Array:
    graph, state = nnx.split(stacked)
    keys = None if key is None else jax.random.split(key, number)

    def body(x_BTD: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
        return layer(x_BTD, nnx.merge(graph, xs[0]), xs[1]), None

    return jax.lax.scan(jax.checkpoint(body) if run.remat else body, x_BTD, (state, keys))[0]


def _family(architecture: str) -> Family:
    return Family(
        kind="seq2seq",
        architecture=architecture,
        read_config=read_config,
        weight_table=weight_table,
        module=T5,
        head_logits=head_logits,
        embedding="shared.weight",
        head="lm_head.weight",
        aliases={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
        ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        values_to_save=values_to_save,
    )


T5_FAMILY = _family("T5ForConditionalGeneration")
MT5_FAMILY = _family("MT5ForConditionalGeneration")
UMT5_FAMILY = _family("UMT5ForConditionalGeneration")
