"""Beam search: keeps the likeliest texts of each prompt side by side and extends them together.

It gives the tokens that `generate(num_beams=W, do_sample=False)` of Transformers 5 gives
(`GenerationMixin._beam_search`, whose rules the comments state):

    a text's score     the sum of its log-probabilities / tokens ** length_penalty, the end token among the tokens
                       and the start token not; a text cut at the greatest length counts as ended
    a prompt is done   when W texts have ended and the likeliest running text, scored at its present length, is no
                       better than the worst of those W: an estimate where the penalty is above 0, as a longer text
                       may score better. early_stopping=True: as soon as W have ended. "never": the running text is
                       scored at the greatest length, where the penalty is above 0
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it.generation.requests import INVALID, Sampling, SlotSettings
from jax_it.generation.sampling import count, is_end, is_finite, process_logits

NEVER = -jnp.inf  # the score of a text that does not exist


class Texts(NamedTuple):
    """Texts of each prompt; beyond a text's end are end tokens."""

    tokens_BWT: jax.Array
    log_probs_BWT: jax.Array  # of each token, by the model
    scores_BW: jax.Array

    def take(self, indices_BW: jax.Array) -> "Texts":
        return jax.tree.map(lambda array: _take(array, indices_BW), self)

    def best(self, number: int) -> jax.Array:
        """Return the indices [B, number] of the best, best first."""
        return jax.lax.top_k(self.scores_BW, number)[1]


class BeamState(NamedTuple):
    """The beams of the prompts under way, one prompt for each slot."""

    running: Texts  # scores: sums of log-probabilities
    ended: Texts  # scores: those sums over the length's penalty
    counts_BWV: jax.Array | None  # as in `sampling.counts_of_prompts`; None where nothing is penalized


@dataclass(frozen=True)
class BeamSearch:
    """Keep `num_beams` texts in each slot, and give the best; its methods are those of `Sampler`.

    Row b * W + w of the cache is beam w of slot b.
    """

    sampling: Sampling
    eos_ids: tuple[int, ...]
    max_new_tokens: int  # T

    @property
    def num_beams(self) -> int:
        return self.sampling.num_beams

    @property
    def counts_tokens(self) -> bool:
        sampling = self.sampling
        return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1, 0, 0)

    def begin(self, token_B: jax.Array, counts_BV: jax.Array | None) -> BeamState:
        """Return beams without a token; as they are all alike, only one of them is extended first."""
        slots, beams = token_B.shape[0], self.num_beams
        tokens_BWT = jnp.full((slots, beams, self.max_new_tokens), self.eos_ids[0], jnp.int32)
        log_probs_BWT = jnp.zeros(tokens_BWT.shape, jnp.float32)
        nothing_BW = jnp.full((slots, beams), NEVER, jnp.float32)
        running = Texts(tokens_BWT, log_probs_BWT, nothing_BW.at[:, 0].set(0))
        counts_BWV = None if counts_BV is None else jnp.repeat(counts_BV[:, None], beams, axis=1)
        return BeamState(running, Texts(tokens_BWT, log_probs_BWT, nothing_BW), counts_BWV)

    def advance(
        self, state: BeamState, settings: SlotSettings, logits_BV: jax.Array, number_B: jax.Array,
        done_B: jax.Array, allowed_BA: jax.Array | None,
    ) -> tuple[BeamState, jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Return (the texts with one more token, those tokens, the rows they continue, which prompts are done)."""
        sampling, beams, slots, limit_B = self.sampling, self.num_beams, number_B.shape[0], settings.limit_Y
        plain = allowed_BA is None
        candidates, beams_BC, tokens_BC = self._extend(state, None if plain else settings, logits_BV, number_B, ~done_B)
        ends_BC = is_end(tokens_BC, self.eos_ids) & ~settings.ignore_eos_Y[:, None]
        ends_BC |= (number_B + 1 >= limit_B)[:, None]
        unfinished = candidates._replace(scores_BW=jnp.where(ends_BC, NEVER, candidates.scores_BW))
        chosen_BW = unfinished.best(beams)
        running, parents_BW, next_BW = (
            unfinished.take(chosen_BW), _take(beams_BC, chosen_BW), _take(tokens_BC, chosen_BW),
        )  # fmt: skip

        penalties_T = jnp.asarray(np.arange(1, self.max_new_tokens + 1) ** float(sampling.length_penalty), jnp.float32)
        penalty_B = penalties_T[number_B]
        ended = _add_ended(state.ended, candidates, ends_BC & ~done_B[:, None], penalty_B)
        never = sampling.early_stopping == "never" and sampling.length_penalty > 0
        best_running_B = running.scores_BW[:, 0] / (penalties_T[limit_B - 1] if never else penalty_B)
        full_B = ended.scores_BW[:, -1] > NEVER
        finished_B = best_running_B <= ended.scores_BW[:, -1]
        if sampling.early_stopping is True:
            finished_B |= full_B
        invalid_B = ~is_finite(logits_BV).reshape(slots, beams).all(1)
        invalid_BWT = invalid_B[:, None, None] & ~done_B[:, None, None]
        ended = ended._replace(tokens_BWT=jnp.where(invalid_BWT, INVALID, ended.tokens_BWT))
        finished_B |= invalid_B

        counts_BWV = state.counts_BWV
        if counts_BWV is not None:
            places = jnp.arange(slots)[:, None], jnp.arange(beams)[None], next_BW
            counts_BWV = count(_take(counts_BWV, parents_BW), places)
        rows_B = (parents_BW + beams * jnp.arange(slots)[:, None]).reshape(-1)
        return (
            BeamState(running, ended, counts_BWV),
            next_BW.reshape(-1),
            rows_B,
            finished_B | (number_B + 1 >= limit_B),
        )

    def read(self, state: BeamState) -> tuple[Any, Any]:
        """Return tokens and log-probabilities [B, texts, T] of the best texts that have ended, best first."""
        texts = self.sampling.num_samples
        return state.ended.tokens_BWT[:, :texts], state.ended.log_probs_BWT[:, :texts]

    def _extend(
        self, state: BeamState, settings: SlotSettings | None, logits_BV: jax.Array, number_B: jax.Array,
        active_B: jax.Array,
    ) -> tuple[Texts, jax.Array, jax.Array]:  # fmt: skip
        """Return the likeliest texts with one more token, the beam [B, C] that each continues, and the token [B, C].

        There are (1 + end tokens) * W of them, so W texts can run on, even if the likeliest continuations are all ends.
        """
        running = state.running
        slots, beams, _ = running.tokens_BWT.shape
        scores_BV = log_probs_BV = jax.nn.log_softmax(logits_BV)
        if settings is not None:
            counts_BV = None if state.counts_BWV is None else state.counts_BWV.reshape(slots * beams, -1)
            settings, number_BW, active_BW = jax.tree.map(
                lambda x: jnp.repeat(x, beams, axis=0), (settings, number_B, active_B)
            )
            scores_BV = process_logits(log_probs_BV, settings, self.eos_ids, number_BW, counts_BV, active_BW)
        sums_BWV = scores_BV.reshape(slots, beams, -1) + running.scores_BW[:, :, None]
        vocab_size = sums_BWV.shape[-1]
        sums_BC, choices_BC = jax.lax.top_k(sums_BWV.reshape(slots, -1), (1 + len(self.eos_ids)) * beams)
        beams_BC, tokens_BC = jnp.divmod(choices_BC, vocab_size)
        tokens_BC = tokens_BC.astype(jnp.int32)
        longer = running.take(beams_BC)
        place = jnp.arange(slots)[:, None], jnp.arange(tokens_BC.shape[1]), number_B[:, None]
        log_probs_BC = jnp.take_along_axis(log_probs_BV.reshape(slots, -1), choices_BC, axis=1)
        texts = Texts(
            longer.tokens_BWT.at[place].set(tokens_BC), longer.log_probs_BWT.at[place].set(log_probs_BC), sums_BC
        )
        return texts, beams_BC, tokens_BC


def _take(array: jax.Array, indices_BW: jax.Array) -> jax.Array:
    """Return each slot's entries with these indices along the second axis."""
    return jnp.take_along_axis(array, indices_BW.reshape(*indices_BW.shape, *(1,) * (array.ndim - 2)), axis=1)


def _add_ended(ended: Texts, candidates: Texts, ends_BC: jax.Array, penalty_B: jax.Array) -> Texts:
    """Return the best W of the ended texts and the candidates that end, of which only the likeliest W count."""
    beams = ended.scores_BW.shape[1]
    ends_BC = ends_BC & (jnp.arange(ends_BC.shape[1]) < beams)
    scores_BC = jnp.where(ends_BC, candidates.scores_BW / penalty_B[:, None], NEVER)
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1), ended, candidates._replace(scores_BW=scores_BC)
    )
    return both.take(both.best(beams))
