"""Choose the next token from logits: the most likely one, or one that is drawn."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_it.generation.requests import INVALID, Sampling


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Return where a token is one that ends a text."""
    return jnp.isin(tokens, jnp.asarray(eos_ids))


def process_logits(
    scores_BV: jax.Array, sampling: Sampling, eos_ids: tuple[int, ...], number_B: jax.Array, seen_BV: jax.Array | None
) -> jax.Array:
    """Apply what holds for greedy decoding, sampling and beams alike, where `number_B` new tokens are there already.

    Scores are logits or, of beams, log-probabilities, which are not normalized again. `seen_BV` says which tokens a
    row has had: a causal model's prompt and the new ones; None without a repetition penalty.
    """
    if seen_BV is not None:
        penalty = sampling.repetition_penalty
        penalized_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
        scores_BV = jnp.where(seen_BV, penalized_BV, scores_BV)
    tokens_V = jnp.arange(scores_BV.shape[-1])
    if sampling.min_new_tokens:
        early_B1 = (number_B < sampling.min_new_tokens)[:, None]
        scores_BV = jnp.where(early_B1 & is_end(tokens_V, eos_ids), -jnp.inf, scores_BV)
    if sampling.forced_bos_token is not None:
        forced_V = jnp.where(tokens_V == sampling.forced_bos_token, 0.0, -jnp.inf)
        scores_BV = jnp.where((number_B == 0)[:, None], forced_V, scores_BV)
    return scores_BV


def is_finite(logits_BV: jax.Array) -> jax.Array:
    """Return whether all logits of a row are finite, [B]."""
    return jnp.isfinite(jnp.abs(logits_BV).max(-1))


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Return the argmax along the last axis: in a third of its time on a CPU, which has no fast loop for pairs."""
    tokens_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, logits_BV.ndim - 1)
    highest_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.where(logits_BV == highest_B1, tokens_BV, logits_BV.shape[-1] - 1).min(-1)


def choose(logits_BV: jax.Array, sampling: Sampling, rows_B: jax.Array, number_B: jax.Array) -> jax.Array:
    """Return the next token of each row. What is drawn depends only on the seed, the row and the token's number."""
    if not sampling.temperature:
        return likeliest(logits_BV)
    logits_BV = filter_logits(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)

    def draw(row: jax.Array, number: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), number)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(rows_B, jnp.broadcast_to(number_B, rows_B.shape), logits_BV)


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float, min_p: float = 0.0) -> jax.Array:
    """Set the logits to -inf of all but the `top_k` likeliest tokens, then of those past `top_p` of the probability,
    and then of those with less than `min_p` times the likeliest one's.

    As in Transformers the token that crosses `top_p` stays, so one always does. Probabilities are summed from the
    least likely token, where float32 can tell small sums apart.
    """
    if top_k:
        smallest_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        order_BV = jnp.argsort(logits_BV, axis=-1)
        rest_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1), axis=-1)
        dropped_BV = (rest_BV <= 1 - top_p).at[:, -1].set(False)
        rows = jnp.arange(logits_BV.shape[0])[:, None]
        logits_BV = logits_BV.at[rows, order_BV].add(jnp.where(dropped_BV, -jnp.inf, 0.0))
    if min_p:
        probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
        least_B1 = min_p * probabilities_BV.max(-1, keepdims=True)
        logits_BV = jnp.where(probabilities_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


class SamplerState(NamedTuple):
    """The texts under way, one for each slot."""

    tokens_BT: jax.Array  # those generated; an end token beyond them
    log_probs_BT: jax.Array  # of each, by the model
    text_id_B: jax.Array  # the text's number, which its draws depend on
    seen_BV: jax.Array | None  # the tokens that a repetition penalty is for


@dataclass(frozen=True)
class Sampler:
    """Generate one text in each slot, greedily or by drawing; `BeamSearch` has the same methods."""

    sampling: Sampling
    eos_ids: tuple[int, ...]
    max_new_tokens: int  # T
    log_probs: bool = False  # whether they are computed

    num_beams = 1  # rows of the cache for each slot

    def begin(self, token_B: jax.Array, text_id_B: jax.Array, seen_BV: jax.Array | None) -> SamplerState:
        """Return texts without a token; `token_B` are the tokens that their first steps take."""
        shape = (token_B.shape[0], self.max_new_tokens)
        return SamplerState(
            jnp.full(shape, self.eos_ids[0], jnp.int32), jnp.zeros(shape, jnp.float32), text_id_B, seen_BV
        )

    def advance(
        self, state: SamplerState, logits_BV: jax.Array, number_B: jax.Array, limit_B: jax.Array, done_B: jax.Array
    ) -> tuple[SamplerState, jax.Array, None, jax.Array]:
        """Return (the texts with one more token, that token, None: each stays in its row, whether it was the last).

        The texts have `number_B` tokens, and may have `limit_B`. A text that is done stays as it is.
        """
        allowed_BV = process_logits(logits_BV, self.sampling, self.eos_ids, number_B, state.seen_BV)
        finite_B = is_finite(logits_BV)
        next_B = choose(allowed_BV, self.sampling, state.text_id_B, number_B).astype(jnp.int32)
        next_B = jnp.where(finite_B, next_B, INVALID)
        rows, at_B = jnp.arange(next_B.shape[0]), jnp.where(done_B, self.max_new_tokens, number_B)
        log_probs_BT = state.log_probs_BT
        if self.log_probs:
            log_prob_B = jax.nn.log_softmax(logits_BV)[rows, next_B]
            log_probs_BT = log_probs_BT.at[rows, at_B].set(log_prob_B, mode="drop")
        longer = SamplerState(
            state.tokens_BT.at[rows, at_B].set(next_B, mode="drop"),
            log_probs_BT,
            state.text_id_B,
            None if state.seen_BV is None else state.seen_BV.at[rows, next_B].set(True),
        )
        return longer, next_B, None, is_end(next_B, self.eos_ids) | (number_B + 1 >= limit_B) | ~finite_B

    def read(self, state: SamplerState) -> tuple[Any, Any]:
        """Return tokens and log-probabilities [B, 1, T]."""
        return state.tokens_BT[:, None], state.log_probs_BT[:, None]
