"""Beam search: the likeliest texts of each prompt, kept side by side and extended together.

It gives the tokens that `generate(num_beams=K, do_sample=False)` of Transformers 5 gives
(`GenerationMixin._beam_search`, whose rules the comments state):

    a text's score     the sum of its log-probabilities / tokens ** length_penalty, the end mark among the tokens
                       and the start mark not; a text cut at the greatest length counts as ended
    a prompt is done   when K texts have ended and the likeliest running text, scored at its present length, is no
                       better than the worst of those K: an estimate where the penalty is above 0, as a longer text
                       may score better. early_stopping=True: as soon as K have ended. "never": the running text is
                       scored at the greatest length, where the penalty is above 0

Dimension letters beside those of models/layers.py: K beams, C candidates.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it.generation.sampling import BROKEN, Sampling, constrain, is_end, is_finite

NEVER = -jnp.inf  # the score of a text that is not there


class Texts(NamedTuple):
    """Texts of each prompt; beyond a text's end stands the end mark."""

    tokens_BKT: jax.Array
    log_probs_BKT: jax.Array  # of each token, by the model
    scores_BK: jax.Array

    def take(self, indices_BK: jax.Array) -> "Texts":
        return jax.tree.map(lambda array: _take(array, indices_BK), self)

    def best(self, number: int) -> jax.Array:
        """The indices [B, number] of the best, best first."""
        return jax.lax.top_k(self.scores_BK, number)[1]


class State(NamedTuple):
    """What is known of the prompts under way, one a slot."""

    running: Texts  # scores: sums of log-probabilities
    ended: Texts  # scores: those sums over the length's penalty
    seen_BKV: jax.Array | None  # the tokens that a repetition penalty is for


@dataclass(frozen=True)
class Beams:
    """A search that keeps `num_beams` texts in each slot, and gives the best; its methods are those of `OneByOne`.

    Row b * K + k of the cache is that of beam k of slot b.
    """

    sampling: Sampling
    ends: tuple[int, ...]
    length: int  # T, tokens of a text at most
    log_probs: bool = False

    @property
    def beams(self) -> int:
        return self.sampling.num_beams

    def begin(self, first_B: jax.Array, row_B: jax.Array, seen_BV: jax.Array | None) -> State:
        """As all beams start alike, one alone is extended first."""
        slots, beams = first_B.shape[0], self.beams
        tokens_BKT = jnp.full((slots, beams, self.length), self.ends[0], jnp.int32)
        log_probs_BKT = jnp.zeros(tokens_BKT.shape, jnp.float32)
        nothing_BK = jnp.full((slots, beams), NEVER, jnp.float32)
        running = Texts(tokens_BKT, log_probs_BKT, nothing_BK.at[:, 0].set(0))
        seen_BKV = None if seen_BV is None else jnp.repeat(seen_BV[:, None], beams, axis=1)
        return State(running, Texts(tokens_BKT, log_probs_BKT, nothing_BK), seen_BKV)

    def advance(
        self, state: State, logits_BV: jax.Array, number_B: jax.Array, limit_B: jax.Array, done_B: jax.Array
    ) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """(the texts with a token more, those tokens, the rows they go on from, which prompts are done)."""
        sampling, beams, slots = self.sampling, self.beams, number_B.shape[0]
        candidates, beams_BC, tokens_BC = self._extend(state, logits_BV, number_B)
        ends_BC = is_end(tokens_BC, self.ends) | (number_B + 1 >= limit_B)[:, None]
        going = candidates._replace(scores_BK=jnp.where(ends_BC, NEVER, candidates.scores_BK))
        chosen_BK = going.best(beams)
        running, parents_BK, next_BK = (
            going.take(chosen_BK), _take(beams_BC, chosen_BK), _take(tokens_BC, chosen_BK),
        )  # fmt: skip

        penalties_T = jnp.asarray(np.arange(1, self.length + 1) ** float(sampling.length_penalty), jnp.float32)
        penalty_B = penalties_T[number_B]
        ended = _add_ended(state.ended, candidates, ends_BC & ~done_B[:, None], penalty_B)
        never = sampling.early_stopping == "never" and sampling.length_penalty > 0
        hoped_B = running.scores_BK[:, 0] / (penalties_T[limit_B - 1] if never else penalty_B)
        full_B = ended.scores_BK[:, -1] > NEVER
        over_B = hoped_B <= ended.scores_BK[:, -1]
        if sampling.early_stopping is True:
            over_B |= full_B
        broken_B = ~is_finite(logits_BV).reshape(slots, beams).all(1)
        broken_BKT = broken_B[:, None, None] & ~done_B[:, None, None]
        ended = ended._replace(tokens_BKT=jnp.where(broken_BKT, BROKEN, ended.tokens_BKT))
        over_B |= broken_B

        seen_BKV = state.seen_BKV
        if seen_BKV is not None:
            places = jnp.arange(slots)[:, None], jnp.arange(beams), next_BK
            seen_BKV = _take(seen_BKV, parents_BK).at[places].set(True)
        rows_B = (parents_BK + beams * jnp.arange(slots)[:, None]).reshape(-1)
        return State(running, ended, seen_BKV), next_BK.reshape(-1), rows_B, over_B | (number_B + 1 >= limit_B)

    def read(self, state: State) -> tuple[Any, Any]:
        """Tokens and log-probabilities [B, texts, T] of the best that have ended, best first."""
        texts = self.sampling.num_samples
        return state.ended.tokens_BKT[:, :texts], state.ended.log_probs_BKT[:, :texts]

    def _extend(self, state: State, logits_BV: jax.Array, number_B: jax.Array) -> tuple[Texts, jax.Array, jax.Array]:
        """The likeliest texts that are one token longer, the beam [B, C] that each continues, and the token [B, C].

        With E end marks they are (1 + E) K: if every beam's likeliest continuations are these, K are left to run.
        """
        running = state.running
        slots, beams, _ = running.tokens_BKT.shape
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        seen_BV = None if state.seen_BKV is None else state.seen_BKV.reshape(slots * beams, -1)
        scores_BV = constrain(log_probs_BV, self.sampling, self.ends, jnp.repeat(number_B, beams), seen_BV)
        sums_BKV = scores_BV.reshape(slots, beams, -1) + running.scores_BK[:, :, None]
        vocabulary = sums_BKV.shape[-1]
        sums_BC, choices_BC = jax.lax.top_k(sums_BKV.reshape(slots, -1), (1 + len(self.ends)) * beams)
        beams_BC, tokens_BC = jnp.divmod(choices_BC, vocabulary)
        tokens_BC = tokens_BC.astype(jnp.int32)
        longer = running.take(beams_BC)
        place = jnp.arange(slots)[:, None], jnp.arange(tokens_BC.shape[1]), number_B[:, None]
        log_probs_BC = jnp.take_along_axis(log_probs_BV.reshape(slots, -1), choices_BC, axis=1)
        texts = Texts(
            longer.tokens_BKT.at[place].set(tokens_BC), longer.log_probs_BKT.at[place].set(log_probs_BC), sums_BC
        )
        return texts, beams_BC, tokens_BC


def _take(array: jax.Array, indices_BK: jax.Array) -> jax.Array:
    """Of each slot the entries with these indices along the second axis."""
    return jnp.take_along_axis(array, indices_BK.reshape(*indices_BK.shape, *(1,) * (array.ndim - 2)), axis=1)


def _add_ended(ended: Texts, candidates: Texts, ends_BC: jax.Array, penalty_B: jax.Array) -> Texts:
    """The best K of the ended texts and the candidates that end, of which only the likeliest K count."""
    beams = ended.scores_BK.shape[1]
    ends_BC = ends_BC & (jnp.arange(ends_BC.shape[1]) < beams)
    scores_BC = jnp.where(ends_BC, candidates.scores_BK / penalty_B[:, None], NEVER)
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1), ended, candidates._replace(scores_BK=scores_BC)
    )
    return both.take(both.best(beams))
