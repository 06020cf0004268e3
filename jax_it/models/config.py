"""What a model computes: its sizes, the kinds of its layers, and the FLOPs that follow from them.

The letters that name every axis, in array names, einsums and weight tables:

    B batch, or slots     T target or query position     S source or key position     D model
    N heads               K key-value heads              H head dimension             F feed-forward
    V vocabulary          L layers                       E relative-position buckets  R adapter rank
    X experts             G source blocks of a row       P learned positions

within one file of models:

    M heads of queries that share a head of keys         U pairs of entries that rotate
    Z distances           I tokens of a device           A experts of a token         J pairs of token and expert
    C entries of several heads, beside each other

and in generation:

    Q prompts that are prefilled together                Y slots that get them        O texts of a slot
    W beams               C candidates: continuations of one prompt that are compared
    A what a slot has several of: alternatives to a token, biases, bytes of bits, blocks

A packed row's source is G blocks of S positions each, and no example crosses a block's border, so self-attention in the
encoder costs no more than in padded batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jax_it.models.experts import Experts
from jax_it.models.norm import NormKind
from jax_it.models.relative_bias import RelativeBias
from jax_it.models.rope import Rope

# Where a layer's norms stand: before attention and feed-forward, after each, or both. "parallel": before, and both read
# the layer's input.
NormPlacement = Literal["pre_norm", "post_norm", "sandwich_norm", "parallel"]


@dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of one model; all of it is static."""

    window: int = 0  # how many positions a token sees to a side, itself included; 0: all
    rope: Rope | None = None
    mixer: Literal["attention"] = "attention"  # of positions; see `layer.MIXERS`


def shortest_period(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """Return the shortest sequence that gives `kinds` when it is repeated and cut to their number."""
    lengths = range(1, len(kinds) + 1)
    return tuple(kinds[: next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))])


class ComputeOptions(NamedTuple):
    """How a forward pass is computed. `prefix_lm` and `dropout` change its result; the rest does not."""

    dtype: Any
    remat: bool = False
    dropout: float = 0.0  # the rate, if a key is given
    prefix_lm: bool = False  # the prompt's positions see each other, within a window to either side
    fused_attention: bool | Literal["interpret"] = False  # by a kernel for TPUs, if one can compute the rows
    recompute: bool = False  # the backward pass computes activations and scores again: faster on a CPU
    unrolled: bool = False  # decoding takes the layers one by one: faster than a scan, but slower to compile


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of layers with its embedding: a causal model's, or half of an encoder-decoder."""

    vocab_size: int  # V
    embed_dim: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_dim: int  # F
    activation: str
    norm_eps: float
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)  # a period: layer i is of kind i % len(layer_kinds)
    gated_mlp: bool = True
    norm: NormKind = "rms"
    norm_placement: NormPlacement = "pre_norm"
    qk_norm: Literal["", "head", "all_heads"] = ""  # over each head's entries, or over those of all heads together
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False
    mlp_bias: bool = False
    relative_bias: RelativeBias | None = None
    encoder_dim: int = 0  # of the states that cross-attention reads; 0: no cross-attention
    attn_scale: float | None = None  # None: H ** -0.5
    attn_logit_softcap: float = 0.0
    final_logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    output_scale: float = 1.0  # of the states that the head reads
    embedding_init: float = 0.02  # standard deviation
    dropout_in: tuple[Literal["attention", "mlp"], ...] = ("attention",)  # beside embeddings and residuals
    experts: Experts | None = None

    def __post_init__(self) -> None:
        assert 1 <= len(self.layer_kinds) <= self.num_layers, "a period has no more layers than the stack"
        assert not (self.relative_bias and any(kind.window for kind in self.layer_kinds)), "not implemented"

    @property
    def scale(self) -> float:
        """What attention's products are multiplied by."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    def stack_flops(self, length: int, source_length: int = 0) -> float:
        """Count those of the layers alone, whose cross-attention reads `source_length` positions."""
        attention = 2 * self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        score = 4 * self.num_heads * self.head_dim
        mlp = 2 * self.embed_dim * self.mlp_dim * (3 if self.gated_mlp else 2)
        if self.experts:
            each = 6 * self.embed_dim * self.experts.mlp_dim
            mlp = 2 * self.embed_dim * self.experts.number + self.experts.per_token * each
        cross = 0
        if self.encoder_dim:
            cross = source_length * 4 * self.encoder_dim * self.num_kv_heads * self.head_dim
            cross += length * (4 * self.embed_dim * self.num_heads * self.head_dim + source_length * score)
        return self.num_layers * (length * (attention + length * score + mlp) + cross)

    def score_count(self, source_length: int, length: int, source_blocks: int = 0) -> float:
        """Count the attention scores of one row's forward pass, over all heads and layers."""
        read = source_blocks * source_length if self.encoder_dim else 0
        return self.num_layers * self.num_heads * length * (length + read)


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig(StackConfig):
    """A causal language model."""

    model_type: str
    tied: bool  # the head is the embedding
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    positions: int = 0  # P, learned ones; 0: rotary, or none
    recompute_longrope: bool = False  # a text that outgrows LongRoPE's original length is computed again
    dropout: float = 0.0

    @property
    def longrope_length(self) -> int:
        """The length of texts beyond which LongRoPE rotates by other frequencies; 0 without LongRoPE."""
        return max((kind.rope.original_length for kind in self.layer_kinds if kind.rope), default=0)

    def flops(self, source_length: int, length: int, source_blocks: int = 0) -> float:
        """Count the matmul FLOPs of one row's forward pass over `length` positions, those of masked scores included."""
        return self.stack_flops(length) + length * 2 * self.embed_dim * self.vocab_size


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder-decoder: two stacks, of which the decoder reads the encoder's states."""

    model_type: str
    encoder: StackConfig
    decoder: StackConfig
    tied: bool  # the head is the decoder's embedding
    shared_embedding: bool  # encoder and decoder have one
    dropout: float
    decoder_start_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    experts: None = None  # as this and the next are in CausalLMConfig
    positions: int = 0

    @property
    def vocab_size(self) -> int:
        """The number of ids that both halves know."""
        return min(self.encoder.vocab_size, self.decoder.vocab_size)

    def flops(self, source_length: int, target_length: int, source_blocks: int = 1) -> float:
        """Count the matmul FLOPs of one forward pass: a target row and `source_blocks` blocks of `source_length`."""
        encoder = source_blocks * self.encoder.stack_flops(source_length)
        head = 2 * target_length * self.decoder.embed_dim * self.decoder.vocab_size
        return encoder + self.decoder.stack_flops(target_length, source_blocks * source_length) + head

    def score_count(self, source_length: int, target_length: int, source_blocks: int = 1) -> float:
        """Count the attention scores of one row's forward pass, over all heads and layers."""
        encoder = source_blocks * self.encoder.score_count(0, source_length)
        return encoder + self.decoder.score_count(source_length, target_length, source_blocks)
