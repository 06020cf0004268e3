"""Choose the next token of every slot from logits, each by its own settings: the most likely one, or one that is drawn.

What no running slot needs is skipped at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_it.generation.requests import INVALID, SlotSettings

MOST_COUNTED = 1 << 15  # of a token in a text, as counts are of 16 bits


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Return where a token is one that ends a text."""
    return jnp.isin(tokens, jnp.asarray(eos_ids))


def counts_of_prompts(tokens_QS: Any, segments_QS: Any, vocab_size: int) -> jax.Array:
    """Return what penalties have to know of prompts without a new token, [Q, V] of 16 bits.

    The lowest bit says whether a token is in the prompt, the others how often it is among the new tokens.
    """
    none_QV = jnp.zeros((tokens_QS.shape[0], vocab_size), jnp.uint16)
    rows_Q1 = jnp.arange(tokens_QS.shape[0])[:, None]
    return none_QV.at[rows_Q1, tokens_QS].max((segments_QS > 0).astype(jnp.uint16))


def count(counts: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    """Return the counts with one more new token in each row."""
    before = counts[at]
    return counts.at[at].set(jnp.where(before >> 1 < MOST_COUNTED - 1, before + 2, before))


def process_logits(
    scores_BV: jax.Array, settings: SlotSettings, eos_ids: tuple[int, ...], number_B: jax.Array,
    counts_BV: jax.Array | None, active_B: jax.Array,
) -> jax.Array:  # fmt: skip
    """Apply what holds for greedy decoding, sampling and beams alike, where `number_B` new tokens are there already.

    Scores are logits or, of beams, log-probabilities, which are not normalized again. `counts_BV` is as in
    `counts_of_prompts`, None where nothing is penalized. Rows that are not active may be left out.
    """
    rows_B1, end_V = jnp.arange(len(number_B))[:, None], is_end(jnp.arange(scores_BV.shape[-1]), eos_ids)
    rate_B, frequency_B, presence_B = (
        settings.repetition_penalty_Y, settings.frequency_penalty_Y, settings.presence_penalty_Y,
    )  # fmt: skip

    def bias(scores_BV: jax.Array) -> jax.Array:
        return scores_BV.at[rows_B1, settings.bias_tokens_YA].add(settings.bias_YA)

    def penalize(scores_BV: jax.Array) -> jax.Array:
        assert counts_BV is not None
        penalized_BV = jnp.where(scores_BV < 0, scores_BV * rate_B[:, None], scores_BV / rate_B[:, None])
        scores_BV = jnp.where(counts_BV > 0, penalized_BV, scores_BV)
        number_BV = (counts_BV >> 1).astype(jnp.float32)
        return scores_BV - frequency_B[:, None] * number_BV - presence_B[:, None] * (number_BV > 0)

    def forbid_ends(scores_BV: jax.Array) -> jax.Array:
        return jnp.where(early_B[:, None] & end_V, -jnp.inf, scores_BV)

    def force(scores_BV: jax.Array) -> jax.Array:
        forced_BV = jnp.where(jnp.arange(scores_BV.shape[-1]) == settings.forced_bos_token_Y[:, None], 0.0, -jnp.inf)
        return jnp.where(forced_B[:, None], forced_BV, scores_BV)

    scores_BV = _where_any((settings.bias_YA != 0).any(-1) & active_B, bias, scores_BV)
    if counts_BV is not None:
        penalized_B = (rate_B != 1) | (frequency_B != 0) | (presence_B != 0)
        scores_BV = _where_any(penalized_B & active_B, penalize, scores_BV)
    early_B = (number_B < settings.min_new_tokens_Y) & active_B
    forced_B = (number_B == 0) & (settings.forced_bos_token_Y >= 0) & active_B
    return _where_any(forced_B, force, _where_any(early_B, forbid_ends, scores_BV))


def allow(scores_BV: jax.Array, allowed_BA: jax.Array) -> jax.Array:
    """Set the scores of tokens to -inf whose bit is 0; the lowest bit of a row's first byte is token 0's."""
    bits_BA8 = (allowed_BA[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    bits_BV = bits_BA8.reshape(len(allowed_BA), -1)[:, : scores_BV.shape[-1]]
    return jnp.where(bits_BV > 0, scores_BV, -jnp.inf)


def is_finite(logits_BV: jax.Array) -> jax.Array:
    """Return whether all logits of a row are finite, [B]."""
    return jnp.isfinite(jnp.abs(logits_BV).max(-1))


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Return the argmax along the last axis: in a third of its time on a CPU, which has no fast loop for pairs."""
    tokens_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, logits_BV.ndim - 1)
    highest_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.where(logits_BV == highest_B1, tokens_BV, logits_BV.shape[-1] - 1).min(-1)


def choose(logits_BV: jax.Array, settings: SlotSettings, number_B: jax.Array, active_B: jax.Array) -> jax.Array:
    """Return the next token of each row. What is drawn depends only on the seed, the text's id and the token's number.

    Rows that are not active may get any token.
    """
    drawn_B = (settings.temperature_Y > 0) & active_B
    top_k_B, top_p_B, min_p_B = settings.top_k_Y, settings.top_p_Y, settings.min_p_Y

    def draw(logits_V: jax.Array, seed_2: jax.Array, text_id: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, text_id), number), logits_V)

    def choose_any(logits_BV: jax.Array) -> jax.Array:
        scaled_BV = logits_BV / jnp.where(drawn_B, settings.temperature_Y, 1)[:, None]
        filtered_B = ((top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0)) & drawn_B
        scaled_BV = _where_any(filtered_B, lambda x: filter_logits(x, top_k_B, top_p_B, min_p_B), scaled_BV)
        tokens_B = jax.vmap(draw)(scaled_BV, settings.seed_Y2, settings.text_id_Y, number_B)
        return jnp.where(drawn_B, tokens_B, likeliest(logits_BV)).astype(jnp.int32)

    return jax.lax.cond(drawn_B.any(), choose_any, lambda x: likeliest(x).astype(jnp.int32), logits_BV)


def filter_logits(logits_BV: jax.Array, top_k: Any, top_p: Any, min_p: Any = 0.0) -> jax.Array:
    """Set the logits to -inf of all but the `top_k` likeliest tokens, then of those past `top_p` of the probability,
    and then of those with less than `min_p` times the likeliest one's.

    Each is a number or one for each row [B]. As in Transformers the token that crosses `top_p` stays, so one always
    does; and so do those that are exactly as likely. Probabilities are summed from the least likely token, where
    float32 can tell small sums apart. Nothing is sorted, which takes a CPU or a TPU longer than the model.
    """
    top_k_B, top_p_B, min_p_B = (jnp.broadcast_to(x, logits_BV.shape[:1]) for x in (top_k, top_p, min_p))
    some_k_B, some_p_B = (top_k_B > 0) & (top_k_B < logits_BV.shape[-1]), top_p_B < 1

    def keep_k(logits_BV: jax.Array) -> jax.Array:
        order_BV = _ordered(logits_BV)
        least_B = _largest(lambda at_B: (order_BV >= at_B[:, None]).sum(-1) >= top_k_B)
        return jnp.where(some_k_B[:, None] & (order_BV < least_B[:, None]), -jnp.inf, logits_BV)

    def keep_p(logits_BV: jax.Array) -> jax.Array:
        order_BV, shares_BV = _ordered(logits_BV), jax.nn.softmax(logits_BV, axis=-1)
        least_B = _largest(lambda at_B: jnp.where(order_BV < at_B[:, None], shares_BV, 0).sum(-1) <= 1 - top_p_B)
        least_B = jnp.minimum(least_B, order_BV.max(-1))
        return jnp.where(some_p_B[:, None] & (order_BV < least_B[:, None]), -jnp.inf, logits_BV)

    def keep_min(logits_BV: jax.Array) -> jax.Array:
        shares_BV = jax.nn.softmax(logits_BV, axis=-1)
        return jnp.where(shares_BV < min_p_B[:, None] * shares_BV.max(-1, keepdims=True), -jnp.inf, logits_BV)

    logits_BV = _where_any(some_p_B, keep_p, _where_any(some_k_B, keep_k, logits_BV))
    return _where_any(min_p_B > 0, keep_min, logits_BV)


def _where_any(needed_B: jax.Array, change: Callable[[jax.Array], jax.Array], scores_BV: jax.Array) -> jax.Array:
    """Return the changed scores if any row needs that."""
    return jax.lax.cond(needed_B.any(), change, lambda scores_BV: scores_BV, scores_BV)


def _ordered(x: jax.Array) -> jax.Array:
    """Return integers of 32 bits in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(1 << 31))


def _largest(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return each row's largest integer of 32 bits for which something holds that holds for all below it."""

    def set_bit(step: jax.Array, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(holds(tried_B), tried_B, found_B)

    rows = jax.eval_shape(holds, jax.ShapeDtypeStruct((1,), jnp.uint32)).shape
    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(rows, jnp.uint32))


class SamplerState(NamedTuple):
    """The texts under way, one for each slot."""

    tokens_BT: jax.Array  # those generated; an end token beyond them
    log_probs_BT: jax.Array  # of each, by the model
    top: tuple[jax.Array, jax.Array] | None  # the A likeliest tokens at each place, and their log-probabilities [B,T,A]
    counts_BV: jax.Array  # as in `counts_of_prompts`; not of plain texts


@dataclass(frozen=True)
class Sampler:
    """Generate one text in each slot, greedily or by drawing; `BeamSearch` has the same methods."""

    eos_ids: tuple[int, ...]
    max_new_tokens: int  # T
    max_logprobs: int = 0  # A
    prompt_lookup_num_tokens: int = 0  # K; see `prompt_lookup.py`

    num_beams = 1  # rows of the cache for each slot
    counts_tokens = True

    def begin(self, token_B: jax.Array, counts_BV: jax.Array | None) -> SamplerState:
        """Return texts without a token; `token_B` are the tokens that their first steps take."""
        assert counts_BV is not None
        shape = (token_B.shape[0], self.max_new_tokens)
        top = None
        if self.max_logprobs:
            top = jnp.zeros((*shape, self.max_logprobs), jnp.int32), jnp.zeros((*shape, self.max_logprobs), jnp.float32)
        return SamplerState(jnp.full(shape, self.eos_ids[0], jnp.int32), jnp.zeros(shape, jnp.float32), top, counts_BV)

    def advance(
        self, state: SamplerState, settings: SlotSettings, logits_BV: jax.Array, number_B: jax.Array,
        done_B: jax.Array, allowed_BA: jax.Array | None,
    ) -> tuple[SamplerState, jax.Array, None, jax.Array]:  # fmt: skip
        """Return (the texts with one more token, that token, None: each stays in its row, whether it was the last).

        The texts have `number_B` tokens. A text that is done stays as it is. `allowed_BA` is for `allow`; if it is
        None, all texts are plain.
        """
        finite_B = is_finite(logits_BV)
        rows, at_B = jnp.arange(len(number_B)), jnp.where(done_B, self.max_new_tokens, number_B)
        if allowed_BA is None:
            next_B = jnp.where(finite_B, likeliest(logits_BV).astype(jnp.int32), INVALID)
        else:
            active_B = ~done_B
            scores_BV = process_logits(logits_BV, settings, self.eos_ids, number_B, state.counts_BV, active_B)
            scores_BV = _where_any((allowed_BA != 255).any(-1), lambda x: allow(x, allowed_BA), scores_BV)
            next_B = jnp.where(finite_B, choose(scores_BV, settings, number_B, active_B), INVALID)
            state = self._record(state, settings.log_probs_Y & active_B, logits_BV, next_B, at_B)
            state = state._replace(counts_BV=count(state.counts_BV, (rows, next_B)))
        ended_B = is_end(next_B, self.eos_ids) & ~settings.ignore_eos_Y
        longer = state._replace(tokens_BT=state.tokens_BT.at[rows, at_B].set(next_B, mode="drop"))
        return longer, next_B, None, ended_B | (number_B + 1 >= settings.limit_Y) | ~finite_B

    def _record(
        self, state: SamplerState, asked_B: jax.Array, logits_BV: jax.Array, next_B: jax.Array, at_B: jax.Array
    ) -> SamplerState:
        """Return the texts with the log-probabilities of their next tokens, if any is asked for."""
        rows, tops = jnp.arange(len(next_B)), self.max_logprobs

        def compute(logits_BV: jax.Array) -> tuple[jax.Array, Any]:
            log_probs_BV = jax.nn.log_softmax(logits_BV)
            return log_probs_BV[rows, next_B], jax.lax.top_k(log_probs_BV, tops) if tops else None

        def skip(logits_BV: jax.Array) -> tuple[jax.Array, Any]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, logits_BV))

        log_prob_B, found = jax.lax.cond(asked_B.any(), compute, skip, logits_BV)
        state = state._replace(log_probs_BT=state.log_probs_BT.at[rows, at_B].set(log_prob_B, mode="drop"))
        if state.top is None:
            return state
        log_probs_BA, tokens_BA = found
        tokens_BTA = state.top[0].at[rows, at_B].set(tokens_BA.astype(jnp.int32), mode="drop")
        return state._replace(top=(tokens_BTA, state.top[1].at[rows, at_B].set(log_probs_BA, mode="drop")))

    def read(self, state: SamplerState) -> tuple[Any, Any]:
        """Return tokens and log-probabilities [B, 1, T]."""
        return state.tokens_BT[:, None], state.log_probs_BT[:, None]
