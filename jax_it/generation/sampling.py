"""How the next token is chosen from logits, and texts that are made of one token after another."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jax_it.errors import UserError


class Sampling(NamedTuple):
    """The most likely token, or one drawn: from the `top_k` likeliest (0: all) that hold `top_p` of the probability.

    With `num_beams` above 1 the best texts of that many kept side by side, as in generation/beam.py. What changes
    logits comes in the order in which Transformers' `generate` has it.
    """

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams: above 0 favours longer texts
    early_stopping: bool | Literal["never"] = False  # of beams: when a prompt is done; see generation/beam.py
    min_p: float = 0.0  # tokens of less than this share of the likeliest one's probability are not drawn
    repetition_penalty: float = 1.0  # divides the positive logits of tokens that were there, multiplies negative ones
    min_new_tokens: int = 0  # no end mark before
    first_token: int | None = None  # the first new token of every text, such as a target language's mark
    num_samples: int = 1  # texts for each prompt: as many draws, or the best of the beams


GREEDY = Sampling()
LONGEST = 1 << 20  # tokens of a text, for which memory is taken before it begins


def check(sampling: Sampling, max_new_tokens: int, vocabulary: int) -> None:
    """Refuses numbers with which float32 would give infinite scores, and so any text. Raises UserError."""
    if max_new_tokens > LONGEST:
        raise UserError(f"max_new_tokens {max_new_tokens}: a text has {LONGEST} tokens at most")
    if sampling.temperature and not 1e-6 <= sampling.temperature <= 1e30:
        raise UserError(f"temperature {sampling.temperature:g}: it must be 0 (greedy), or from 1e-6 to 1e30")
    if not 1e-6 <= sampling.repetition_penalty <= 1e30:
        raise UserError(f"repetition_penalty {sampling.repetition_penalty:g}: it must be from 1e-6 to 1e30")
    if not abs(sampling.length_penalty) * math.log10(max_new_tokens + 1) <= 30:
        raise UserError(
            f"length_penalty {sampling.length_penalty:g}: {max_new_tokens} tokens to this power are beyond 1e30; take "
            "one nearer to 0"
        )
    if sampling.num_beams > vocabulary:
        raise UserError(f"num_beams {sampling.num_beams}: the model has {vocabulary} tokens to begin with; take fewer")


def is_end(tokens: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """Where a token is one that ends a text."""
    return jnp.isin(tokens, jnp.asarray(ends))


def constrain(
    scores_BV: jax.Array, sampling: Sampling, ends: tuple[int, ...], number_B: jax.Array, seen_BV: jax.Array | None
) -> jax.Array:
    """Scores under the rules that hold for greedy decoding, sampling and beams; `number_B` tokens are made already.

    Scores are logits or, of beams, log-probabilities, which are not normalised again. `seen_BV` says which tokens a
    row has had: its prompt's, of a causal model, and those it made; None without a repetition penalty.
    """
    if seen_BV is not None:
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
        scores_BV = jnp.where(seen_BV, penalised_BV, scores_BV)
    tokens_V = jnp.arange(scores_BV.shape[-1])
    if sampling.min_new_tokens:
        early_B1 = (number_B < sampling.min_new_tokens)[:, None]
        scores_BV = jnp.where(early_B1 & is_end(tokens_V, ends), -jnp.inf, scores_BV)
    if sampling.first_token is not None:
        forced_V = jnp.where(tokens_V == sampling.first_token, 0.0, -jnp.inf)
        scores_BV = jnp.where((number_B == 0)[:, None], forced_V, scores_BV)
    return scores_BV


BROKEN = -1  # in place of a token: its logits were not finite


def is_finite(logits_BV: jax.Array) -> jax.Array:
    """Whether all logits of a row are finite, [B]."""
    return jnp.isfinite(jnp.abs(logits_BV).max(-1))


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """What argmax gives along the last axis; on a CPU, which has no fast loop for pairs, in a third of its time."""
    tokens_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, logits_BV.ndim - 1)
    highest_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.where(logits_BV == highest_B1, tokens_BV, logits_BV.shape[-1] - 1).min(-1)


def choose(logits_BV: jax.Array, sampling: Sampling, rows_B: jax.Array, number_B: jax.Array) -> jax.Array:
    """The next token of each row. What is drawn for a row depends on the seed, its row and token number alone."""
    if not sampling.temperature:
        return likeliest(logits_BV)
    logits_BV = restrict(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)

    def draw(row: jax.Array, number: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), number)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(rows_B, jnp.broadcast_to(number_B, rows_B.shape), logits_BV)


def restrict(logits_BV: jax.Array, top_k: int, top_p: float, min_p: float = 0.0) -> jax.Array:
    """Logits at -inf for all but the `top_k` likeliest tokens, for those past `top_p` of the probability, and then
    for those below `min_p` of the likeliest one's.

    As in Transformers: the token that crosses `top_p` stays, and one always does. Summed from the least likely
    token, where float32 tells a small rest from a smaller one.
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


class State(NamedTuple):
    """What is known of the texts under way, one a slot."""

    tokens_BT: jax.Array  # those made; beyond them an end mark
    log_probs_BT: jax.Array  # of each, by the model
    row_B: jax.Array  # the text's number, which its draws depend on
    seen_BV: jax.Array | None  # the tokens that a repetition penalty is for


@dataclass(frozen=True)
class OneByOne:
    """A search that makes one text in each slot: greedy, or drawn. `beam.Beams` is the other one."""

    sampling: Sampling
    ends: tuple[int, ...]
    length: int  # T, tokens of a text at most
    log_probs: bool = False  # whether they are asked for

    beams = 1  # rows of the cache that a slot has

    def begin(self, first_B: jax.Array, row_B: jax.Array, seen_BV: jax.Array | None) -> State:
        """Texts that have no token yet; `first_B` are the tokens that their first steps take."""
        shape = (first_B.shape[0], self.length)
        return State(jnp.full(shape, self.ends[0], jnp.int32), jnp.zeros(shape, jnp.float32), row_B, seen_BV)

    def advance(
        self, text: State, logits_BV: jax.Array, number_B: jax.Array, limit_B: jax.Array, done_B: jax.Array
    ) -> tuple[State, jax.Array, None, jax.Array]:
        """(the texts with a token more, that token, None: each stays in its row, whether it was the last).

        `number_B` tokens are made already, and `limit_B` at most. A text that is done stays as it is.
        """
        allowed_BV = constrain(logits_BV, self.sampling, self.ends, number_B, text.seen_BV)
        finite_B = is_finite(logits_BV)
        next_B = choose(allowed_BV, self.sampling, text.row_B, number_B).astype(jnp.int32)
        next_B = jnp.where(finite_B, next_B, BROKEN)
        rows, at_B = jnp.arange(next_B.shape[0]), jnp.where(done_B, self.length, number_B)
        log_probs_BT = text.log_probs_BT
        if self.log_probs:
            log_prob_B = jax.nn.log_softmax(logits_BV)[rows, next_B]
            log_probs_BT = log_probs_BT.at[rows, at_B].set(log_prob_B, mode="drop")
        longer = State(
            text.tokens_BT.at[rows, at_B].set(next_B, mode="drop"),
            log_probs_BT,
            text.row_B,
            None if text.seen_BV is None else text.seen_BV.at[rows, next_B].set(True),
        )
        return longer, next_B, None, is_end(next_B, self.ends) | (number_B + 1 >= limit_B) | ~finite_B

    def read(self, text: State) -> tuple[Any, Any]:
        """Tokens and log-probabilities [B, texts, T]."""
        return text.tokens_BT[:, None], text.log_probs_BT[:, None]
