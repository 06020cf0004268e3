"""Beam search: the likeliest texts of each row, kept side by side and extended together.

It gives the tokens that `generate(num_beams=K, do_sample=False)` of Transformers 5 gives
(`GenerationMixin._beam_search`, whose rules the comments state):

    a text's score   the sum of its log-probabilities / tokens ** length_penalty, the end mark among the tokens
                     and the start mark not; a text cut at the greatest length counts as ended
    a row is closed  when K texts have ended and early_stopping is set, or the likeliest running text, scored at
                     its present length, is no better than the worst of those K: an estimate where the penalty
                     is above 0, as a longer text may score better

Dimension letters beside those of models/layers.py: K beams, C candidates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it.generation.sampling import is_end

NEVER = -jnp.inf  # the score of a text that is not there


class Texts(NamedTuple):
    """Texts of each row. Tokens follow the first step's; beyond a text's end stands the end mark."""

    tokens_BKT: jax.Array  # T is one more than the greatest length
    scores_BK: jax.Array

    def take(self, indices_BK: jax.Array) -> "Texts":
        tokens_BKT = jnp.take_along_axis(self.tokens_BKT, indices_BK[:, :, None], axis=1)
        return Texts(tokens_BKT, jnp.take_along_axis(self.scores_BK, indices_BK, axis=1))

    def best(self, number: int) -> jax.Array:
        """The indices [B, number] of the best, best first."""
        return jax.lax.top_k(self.scores_BK, number)[1]


class State(NamedTuple):
    position: jax.Array
    running: Texts  # scores: sums of log-probabilities
    ended: Texts  # scores: those sums over the length's penalty
    open_B: jax.Array
    cache: Any  # row b * K + k is that of beam k of row b


def beam_search(
    step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    take_rows: Callable[[Any, jax.Array], Any],
    cache: Any,
    *,
    first_B: jax.Array,
    length: int,
    num_beams: int,
    end_tokens: tuple[int, ...],
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> jax.Array:
    """The best text of each row, tokens [B, T]; the end mark repeats to a row's end.

    `step(tokens_B, number, cache)` returns the logits [B, V] after one more token a row, whose number counts
    from 0, and the new cache; `first_B` are the tokens of the first step. `take_rows(cache, rows_B)` returns
    the cache whose row b is row `rows_B[b]`: first K of each row, then those that go on. Row b * K + k is
    always a beam of row b, so what these share need not move.
    """
    penalties_T = jnp.asarray(np.arange(1, length + 1) ** float(length_penalty), jnp.float32)

    def unfinished(state: State) -> jax.Array:
        return (state.position < length) & state.open_B.any()

    def advance(state: State) -> State:
        position, running = state.position, state.running
        last_B = running.tokens_BKT[:, :, position].reshape(-1)
        logits_BV, cache = step(last_B, position, state.cache)
        candidates, beams_BC = _extend(running, logits_BV, position, len(end_tokens))
        ends_BC = is_end(candidates.tokens_BKT[:, :, position + 1], end_tokens) | (position + 1 == length)
        going = candidates._replace(scores_BK=jnp.where(ends_BC, NEVER, candidates.scores_BK))
        chosen_BK = going.best(num_beams)
        running, beams_BK = going.take(chosen_BK), jnp.take_along_axis(beams_BC, chosen_BK, axis=1)
        ended = _add_ended(state.ended, candidates, ends_BC & state.open_B[:, None], penalties_T[position])
        improvable_B = running.scores_BK[:, 0] / penalties_T[position] > ended.scores_BK[:, -1]
        full_B = ended.scores_BK[:, -1] > NEVER
        open_B = state.open_B & improvable_B & ~(full_B & early_stopping)
        cache = take_rows(cache, (beams_BK + num_beams * jnp.arange(rows)[:, None]).reshape(-1))
        return State(position + 1, running, ended, open_B, cache)

    rows = first_B.shape[0]
    tokens_BKT = jnp.full((rows, num_beams, length + 1), end_tokens[0], jnp.int32).at[:, :, 0].set(first_B[:, None])
    nothing_BK = jnp.full((rows, num_beams), NEVER, jnp.float32)
    running = Texts(tokens_BKT, nothing_BK.at[:, 0].set(0))  # all start alike, so one alone is extended first
    cache = take_rows(cache, jnp.repeat(jnp.arange(rows), num_beams))
    state = State(jnp.int32(0), running, Texts(tokens_BKT, nothing_BK), jnp.ones(rows, bool), cache)
    return jax.lax.while_loop(unfinished, advance, state).ended.tokens_BKT[:, 0, 1:]


def _extend(running: Texts, logits_BV: jax.Array, position: jax.Array, ends: int) -> tuple[Texts, jax.Array]:
    """The likeliest texts that are one token longer, and the beam [B, C] that each continues.

    With `ends` end marks they are (1 + ends) K: if every beam's likeliest continuations are these, K are left to run.
    """
    rows, beams, _ = running.tokens_BKT.shape
    sums_BKV = jax.nn.log_softmax(logits_BV).reshape(rows, beams, -1) + running.scores_BK[:, :, None]
    scores_BC, choices_BC = jax.lax.top_k(sums_BKV.reshape(rows, -1), (1 + ends) * beams)
    beams_BC, tokens_BC = jnp.divmod(choices_BC, sums_BKV.shape[-1])
    longer = running.take(beams_BC).tokens_BKT.at[:, :, position + 1].set(tokens_BC)
    return Texts(longer, scores_BC), beams_BC


def _add_ended(ended: Texts, candidates: Texts, ends_BC: jax.Array, penalty: jax.Array) -> Texts:
    """The best K of the ended texts and the candidates that end, of which only the likeliest K count."""
    beams = ended.scores_BK.shape[1]
    ends_BC = ends_BC & (jnp.arange(ends_BC.shape[1]) < beams)
    scores_BC = jnp.where(ends_BC, candidates.scores_BK / penalty, NEVER)
    both = Texts(
        jnp.concatenate([ended.tokens_BKT, candidates.tokens_BKT], axis=1),
        jnp.concatenate([ended.scores_BK, scores_BC], axis=1),
    )
    return both.take(both.best(beams))
