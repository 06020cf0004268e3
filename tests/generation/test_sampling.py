"""Tokens are drawn with the softmax's probabilities, from exactly the tokens that top-k and top-p leave."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.generation import Sampling
from jax_it.generation.requests import SlotSettings, TextSettings, slot_settings
from jax_it.generation.sampling import (
    MOST_COUNTED,
    allow,
    choose,
    count,
    counts_of_prompts,
    filter_logits,
    process_logits,
)  # fmt: skip

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


def processed(logits_V: np.ndarray, sampling: Sampling, prompt: list[int], text: list[int], ends: tuple) -> np.ndarray:
    """The scores that a token is drawn from, by the definitions, one after the other, in float64."""
    scores_V = logits_V.astype(np.float64)
    for token, bias in sampling.logit_bias:
        scores_V[token] += bias
    for token in {*prompt, *text}:
        scores_V[token] *= sampling.repetition_penalty if scores_V[token] < 0 else 1 / sampling.repetition_penalty
    for token in set(text):
        scores_V[token] -= sampling.frequency_penalty * text.count(token) + sampling.presence_penalty
    if len(text) < sampling.min_new_tokens:
        scores_V[list(ends)] = -np.inf
    if not text and sampling.forced_bos_token is not None:
        scores_V[:] = -np.inf
        scores_V[sampling.forced_bos_token] = 0
    if not sampling.temperature:
        return scores_V
    scores_V /= sampling.temperature
    left = left_by(scores_V, sampling.top_k, sampling.top_p)
    highest = scores_V.max()
    return np.array(
        [s if i in left and np.exp(s - highest) >= sampling.min_p else -np.inf for i, s in enumerate(scores_V)]
    )


def test_each_row_of_a_mixture_is_processed_by_its_own_settings(logits):
    rng = np.random.default_rng(1)
    samplings, prompts, texts = [], [], []
    for _ in range(ROWS):
        some = {
            "temperature": rng.uniform(0.3, 2), "top_k": int(rng.integers(1, VOCABULARY)), "top_p": rng.uniform(0.1, 1),
            "min_p": rng.uniform(0, 0.3), "repetition_penalty": rng.uniform(0.5, 2),
            "frequency_penalty": rng.uniform(-2, 2), "presence_penalty": rng.uniform(-2, 2),
            "min_new_tokens": int(rng.integers(1, 6)), "forced_bos_token": int(rng.integers(VOCABULARY)),
            "logit_bias": ((3, 2.5), (int(rng.integers(4, VOCABULARY)), -100.0)),
        }  # fmt: skip
        samplings.append(Sampling(**{name: value for name, value in some.items() if rng.random() < 0.4}))
        prompts.append(rng.integers(0, VOCABULARY, 5).tolist())
        texts.append(rng.integers(0, VOCABULARY // 3, rng.integers(0, 9)).tolist())
    settings = slot_settings([TextSettings(sampling, 0, 9, False) for sampling in samplings], ROWS)
    counts_BV = counts_of_prompts(np.array(prompts), np.ones((ROWS, 5), np.int32), VOCABULARY)
    for at in range(8):
        longer = np.array([row for row in range(ROWS) if len(texts[row]) > at])
        counts_BV = count(counts_BV, (longer, np.array([texts[row][at] for row in longer])))
    number_B, ends = np.array([len(text) for text in texts]), (0, 2)
    scores_BV = process_logits(jnp.asarray(logits), settings, ends, number_B, counts_BV, np.ones(ROWS, bool))
    scaled_BV = scores_BV / np.where(settings.temperature_Y > 0, settings.temperature_Y, 1)[:, None]
    drawn = filter_logits(scaled_BV, settings.top_k_Y, settings.top_p_Y, settings.min_p_Y)
    found_BV = np.where(settings.temperature_Y[:, None] > 0, drawn, scores_BV)
    for row in range(ROWS):
        expected_V = processed(logits[row], samplings[row], prompts[row], texts[row], ends)
        np.testing.assert_allclose(found_BV[row], expected_V, rtol=1e-5, atol=1e-5)


def test_counts_of_tokens_stop_at_the_most_that_they_hold():
    counts = jnp.full((1, 2), 2 * (MOST_COUNTED - 2) + 1, jnp.uint16)
    for _ in range(3):
        counts = count(counts, (jnp.array([0]), jnp.array([1])))
    assert counts.tolist() == [[2 * (MOST_COUNTED - 2) + 1, 2 * (MOST_COUNTED - 1) + 1]]


def test_a_bit_of_each_token_says_whether_it_is_allowed(logits):
    allowed_BV = np.random.default_rng(3).random(logits.shape) < 0.5
    found = np.asarray(allow(jnp.asarray(logits), jnp.asarray(np.packbits(allowed_BV, axis=1, bitorder="little"))))
    np.testing.assert_array_equal(found, np.where(allowed_BV, logits, -np.inf))


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
