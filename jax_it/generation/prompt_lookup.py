"""Speculative decoding by prompt lookup (Saxena 2023), exact under greedy decoding: several tokens in one step.

Where a text's last tokens occurred before, in its prompt or in the text, the tokens that followed there are a draft of
its next ones. One step computes all of a draft, and keeps those tokens that greedy decoding gives, and the one after.
A step in which no text has a draft is that of `slots.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_it.errors import UserError
from jax_it.generation import slots
from jax_it.generation.requests import INVALID, Sampling, TextSettings
from jax_it.generation.sampling import Sampler, is_end, is_finite, likeliest
from jax_it.generation.slots import SlotState
from jax_it.models import DecodingWeights, Model

# How many of a text's last tokens are looked up: drafts found by a single token, as in Transformers, are seldom right.
LONGEST_NGRAM, SHORTEST_NGRAM = 3, 2


def check(model: Model, sampling: Sampling) -> None:
    """Raise UserError for a model, or for settings, whose texts are not decoded by prompt lookup."""
    name = f"prompt_lookup_num_tokens {sampling.prompt_lookup_num_tokens}"
    if not TextSettings(sampling, 0, 1, False).is_plain or sampling.num_beams > 1:
        raise UserError(f"{name}: it is for greedy decoding, without beams or penalties; leave it out")
    c: Any = model.config
    if not model.can_extend or any(kind.window for kind in c.layer_kinds):
        raise UserError(
            f"{name}: it is for causal models without sliding windows, LongRoPE or a prefix that sees both ways; leave "
            "it out"
        )


def decode_step(model: Model, sampler: Sampler, weights: DecodingWeights, state: SlotState) -> SlotState:
    """Return the slots after one more step of texts that are all plain: one token or more in each that is not done."""
    drafts_BK, drafted_B = _drafts(sampler, state)
    return jax.lax.cond(
        (drafted_B > 0).any(),
        partial(_verify, model, sampler, weights),
        lambda state, *_: slots.decode_step(model, sampler, weights, state, None),
        state, drafts_BK, drafted_B,
    )  # fmt: skip


def _drafts(sampler: Sampler, state: SlotState) -> tuple[jax.Array, jax.Array]:
    """Return drafts of each text's next tokens [B, K], and how many tokens each draft has, [B]."""
    text_BT, end_B = _texts(state), state.start_B + state.number_B + 1
    length, longest = text_BT.shape[1], jnp.minimum(LONGEST_NGRAM, end_B)
    # How many tokens, up to each place, are those at the end of the text.
    matched_BT, equal_BT = jnp.zeros_like(text_BT), jnp.ones_like(text_BT, bool)
    for back in range(LONGEST_NGRAM):
        last_B1 = jnp.take_along_axis(text_BT, jnp.maximum(end_B - 1 - back, 0)[:, None], axis=1)
        shifted_BT = jnp.pad(text_BT, ((0, 0), (back, 0)), constant_values=INVALID)[:, :length]
        equal_BT &= (shifted_BT == last_B1) & (back < longest)[:, None]
        matched_BT += equal_BT
    matched_BT = jnp.where(jnp.arange(length) < end_B[:, None] - 1, matched_BT, 0)
    at_B = matched_BT.argmax(1) + 1  # after the first one of the longest matches
    found_B = (matched_BT.max(1) >= SHORTEST_NGRAM) & ~state.done_B
    allowed_B = jnp.minimum(end_B - at_B, state.settings.limit_Y - state.number_B - 1)  # the step adds one token more
    drafted_B = jnp.where(found_B, jnp.minimum(sampler.prompt_lookup_num_tokens, allowed_B), 0)
    places_BK = at_B[:, None] + jnp.arange(sampler.prompt_lookup_num_tokens)
    return jnp.take_along_axis(text_BT, jnp.minimum(places_BK, length - 1), axis=1), drafted_B


def _texts(state: SlotState) -> jax.Array:
    """Return prompts and new tokens, one after the other [B, T]."""
    assert state.cache.prompts is not None
    prompts_BT = state.cache.prompts[: len(state.start_B)]  # the cache has all slots
    tokens_BT, places_T = state.texts.tokens_BT, jnp.arange(prompts_BT.shape[1])
    new_BT = jnp.clip(places_T - state.start_B[:, None] - 1, 0, tokens_BT.shape[1] - 1)
    is_prompt_BT = places_T <= state.start_B[:, None]
    return jnp.where(is_prompt_BT, prompts_BT, jnp.take_along_axis(tokens_BT, new_BT, axis=1))


def _verify(
    model: Model, sampler: Sampler, weights: DecodingWeights, state: SlotState, drafts_BK: jax.Array,
    drafted_B: jax.Array,
) -> SlotState:  # fmt: skip
    """Compute each text's drafted tokens in one step, and keep those that are the likeliest, and one more."""
    tokens_BT = jnp.concatenate([state.token_B[:, None], drafts_BK], axis=1)
    place_T, row_B1 = jnp.arange(tokens_BT.shape[1]), jnp.arange(len(tokens_BT))[:, None]
    segments_BT = (place_T <= drafted_B[:, None]).astype(jnp.int32)
    start_B = state.start_B + state.number_B
    logits_BTV, cache = model.extend(weights, tokens_BT, segments_BT, start_B, state.cache)
    finite_BT = is_finite(logits_BTV)
    next_BT = jnp.where(finite_BT, likeliest(logits_BTV).astype(jnp.int32), INVALID)
    # A token is kept if all before it are the text's, and none of them ends it.
    ends_BT = (is_end(next_BT, sampler.eos_ids) & ~state.settings.ignore_eos_Y[:, None]) | ~finite_BT
    continues_BK = (next_BT[:, :-1] == drafts_BK) & (place_T[1:] <= drafted_B[:, None]) & ~ends_BT[:, :-1]
    added_B = jnp.where(state.done_B, 0, 1 + jnp.cumprod(continues_BK, axis=1).sum(1))
    is_added_BT = place_T < added_B[:, None]
    at_BT = jnp.where(is_added_BT, state.number_B[:, None] + place_T, sampler.max_new_tokens)
    texts = state.texts._replace(tokens_BT=state.texts.tokens_BT.at[row_B1, at_BT].set(next_BT, mode="drop"))
    last_B = jnp.take_along_axis(next_BT, jnp.maximum(added_B - 1, 0)[:, None], axis=1)[:, 0]
    number_B = state.number_B + added_B
    done_B = state.done_B | (ends_BT & is_added_BT).any(1) | (number_B >= state.settings.limit_Y)
    return slots.sharded(state._replace(cache=cache, token_B=last_B, number_B=number_B, done_B=done_B, texts=texts))
