"""What attention computes, in plain JAX; `fast_attention.attend` computes the same for all positions of long rows.

Scores and softmax are float32, and N // K heads of queries share each head of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_it.models.dropout import dropout
from jax_it.sharding import constrain

MASKED = -1e30  # the score of a pair that is not allowed; finite, so that a row of them does not become NaN


class Scores(NamedTuple):
    """How scores are made of products of queries and keys."""

    scale: float = 1.0
    softcap: float = 0.0  # Gemma 2: squashed into (-softcap, softcap); 0: not
    dropout: float = 0.0  # the rate of the weights, if a dropout key is given

    def of(self, products: jax.Array, bias: jax.Array | None, mask: jax.Array) -> jax.Array:
        """Return the scores of products [..., N, T, S], with a bias added, and masked where `mask` is false."""
        if self.scale != 1:
            products *= self.scale
        if self.softcap:
            products = self.softcap * jnp.tanh(products / self.softcap)
        if bias is not None:
            products += bias
        return jnp.where(mask, products, MASKED)


class Mask(NamedTuple):
    """Which keys a query may see: those that are allowed and, with a window, near."""

    allowed_BTS: jax.Array
    segments: tuple[jax.Array, jax.Array] | None = None  # of queries and keys: if they and `causal` say what is allowed
    causal: bool = False  # no key after its query is
    window: int = 0  # less than this many positions away, before the query or after it; 0: all


def segment_mask(segments_BT: jax.Array, key_segments_BS: jax.Array) -> Mask:
    """Return the mask of queries that see all keys of their segment."""
    allowed_BTS = segments_BT[:, :, None] == key_segments_BS[:, None]
    return Mask(allowed_BTS, (segments_BT, key_segments_BS))


def causal_mask(segments_BT: jax.Array, prefix_BT: jax.Array | None = None) -> Mask:
    """Return the mask of positions that see those of their segment not after them, or both in the segment's prefix."""
    same, before_TS = segment_mask(segments_BT, segments_BT), jnp.tri(segments_BT.shape[1], dtype=bool)
    if prefix_BT is None:
        return same._replace(allowed_BTS=same.allowed_BTS & before_TS, causal=True)
    in_prefix_BTS = (prefix_BT[:, :, None] > 0) & (prefix_BT[:, None] > 0)
    return Mask(same.allowed_BTS & (before_TS | in_prefix_BTS))


def plain_attention(
    query_BTNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, scores: Scores, mask_BTS: jax.Array,
    bias: jax.Array | None = None, dropout_key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attend in plain JAX, all scores at once, to keys and values in the order of a cache."""
    rows, length, heads, head_dim = query_BTNH.shape
    kv_heads = key_BKHS.shape[1]
    # M: the heads of queries that share a head of keys. The products' axes come as they are multiplied, rows of memory
    # last, and between the two there are four: anything else takes a CPU up to four times as long.
    query_BKMTH = jnp.swapaxes(query_BTNH, 1, 2).reshape(rows, kv_heads, heads // kv_heads, length, head_dim)
    scores_BKMTS = jnp.einsum("BKMTH,BKHS->BKMTS", query_BKMTH, key_BKHS, preferred_element_type=jnp.float32)
    scores_BNTS = scores.of(scores_BKMTS.reshape(rows, heads, length, -1), bias, mask_BTS[:, None])
    powers_BNTS = jnp.exp(scores_BNTS - jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True)))
    # The softmax's sum divides the result: H numbers in place of S.
    sum_BNT1 = powers_BNTS.sum(-1, keepdims=True)
    powers_BNTS = dropout(powers_BNTS, scores.dropout, dropout_key).astype(value_BKSH.dtype)
    powers_BKMTS = powers_BNTS.reshape(scores_BKMTS.shape)
    attended_BKMTH = jnp.einsum("BKMTS,BKSH->BKMTH", powers_BKMTS, value_BKSH, preferred_element_type=jnp.float32)
    attended_BNTH = attended_BKMTH.reshape(rows, heads, length, -1) / sum_BNT1
    return jnp.swapaxes(attended_BNTH, 1, 2).astype(value_BKSH.dtype)


def by_head(key_BSKH: jax.Array, value_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys [B, K, H, S] and values [B, K, S, H]: the order in which they are multiplied and cached."""
    return jnp.moveaxis(key_BSKH, 1, -1), jnp.swapaxes(value_BSKH, 1, 2)


def gather_kv(x_BSKH: jax.Array, rows: int) -> jax.Array:
    """Bring keys or values, computed where their positions lie, to every device that has some of a row's queries.

    A source of G blocks comes as G rows of its own, and is returned as one of G times the length.
    """
    x_BSKH = constrain(constrain(x_BSKH, "B T K H"), "B S K H")
    return x_BSKH.reshape(rows, -1, *x_BSKH.shape[2:])
