"""Tokens are drawn with the softmax's probabilities, from exactly the tokens that top-k and top-p leave."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.generation import Sampling
from jax_it.generation.requests import SlotSettings, TextSettings, slot_settings
from jax_it.generation.sampling import choose, filter_logits

ROWS, VOCABULARY = 50, 30


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (ROWS, VOCABULARY)).astype(np.float32)


def settings_of(sampling: Sampling, text_ids: np.ndarray) -> SlotSettings:
    """Those of texts with these ids."""
    return slot_settings([TextSettings(sampling, int(i), 1, False) for i in text_ids], len(text_ids))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def left_by(logits_V: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The tokens that are left: the `top_k` likeliest, and of these the fewest that hold `top_p` of what they have."""
    order = np.argsort(-logits_V)[: top_k or None]
    probabilities = softmax(logits_V[order])
    kept: list[int] = []
    for token in order.tolist():
        kept.append(token)
        if probabilities[: len(kept)].sum() >= top_p:
            break
    return set(kept)


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, VOCABULARY, 2 * VOCABULARY])
def test_top_k_and_top_p_leave_exactly_the_right_tokens_as_they_were(logits, top_k, top_p):
    restricted = np.asarray(filter_logits(jnp.asarray(logits), top_k, top_p))
    for before, after in zip(logits, restricted, strict=True):
        (left,) = np.isfinite(after).nonzero()
        assert set(left.tolist()) == left_by(before, top_k, top_p)
        assert (after[left] == before[left]).all()
        assert np.isneginf(np.delete(after, left)).all()


def test_tokens_as_likely_as_the_last_of_the_top_k_stay_too():
    restricted = filter_logits(jnp.array([[1.0, 3.0, 2.0, 2.0, 0.0]]), 2, 1.0)
    assert np.isfinite(restricted).tolist() == [[False, True, True, True, False]]


def test_top_p_is_a_share_of_what_top_k_leaves():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    assert np.isfinite(filter_logits(logits, 0, 0.55)).sum() == 2
    assert np.isfinite(filter_logits(logits, 2, 0.55)).sum() == 1  # 0.4 / 0.7 = 0.57


def test_without_a_temperature_the_likeliest_token_is_chosen(logits):
    settings = settings_of(Sampling(top_k=5, top_p=0.5, seed=3), np.arange(ROWS))
    chosen = choose(jnp.asarray(logits), settings, np.zeros(ROWS, np.int32), np.ones(ROWS, bool))
    assert (np.asarray(chosen) == logits.argmax(-1)).all()


def test_a_draw_depends_on_its_row_number_not_on_its_place(logits):
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=7)
    numbers = np.arange(100, 100 + ROWS)
    fourth, active = np.full(ROWS, 4), np.ones(ROWS, bool)
    drawn = np.asarray(choose(jnp.asarray(logits), settings_of(sampling, numbers), fourth, active))
    for chosen in ([3, 0], [0, 49], [17, 48]):
        settings = settings_of(sampling, numbers[chosen])
        again = choose(jnp.asarray(logits[chosen]), settings, fourth[:2], active[:2])
        assert (np.asarray(again) == drawn[chosen]).all()


@pytest.mark.parametrize("what", ["rows", "positions", "seeds"])
@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0), Sampling(1.5, top_k=8), Sampling(1.0, top_p=0.8)])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(sampling, what):
    """Chi-square over many draws that differ in row, position or seed alone."""
    draws = 20_000
    logits_V = np.random.default_rng(2).normal(0, 1, 12).astype(np.float32)

    numbers = np.arange(draws)
    rows, positions, seeds = (numbers if what == name else np.full(draws, 3) for name in ("rows", "positions", "seeds"))
    settings = settings_of(sampling, rows)
    settings = settings._replace(seed_Y2=np.stack([0 * seeds, seeds], axis=1).astype(np.uint32))
    logits_BV = jnp.broadcast_to(logits_V, (draws, len(logits_V)))
    drawn = jax.jit(choose)(logits_BV, settings, positions, np.ones(draws, bool))
    scaled_V = logits_V / sampling.temperature
    left = sorted(left_by(scaled_V, sampling.top_k, sampling.top_p))
    expected = draws * softmax(scaled_V[left])
    counts = np.bincount(np.asarray(drawn), minlength=12)
    assert counts.sum() == counts[left].sum() == draws, "a token was drawn that is left out"
    statistic = ((counts[left] - expected) ** 2 / expected).sum()
    freedom = len(left) - 1  # the mean; the variance is twice that
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
