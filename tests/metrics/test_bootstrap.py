"""Intervals are those of resampled texts, and those of sacrebleu's own bootstrap."""

import math
import os
import random

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import _bootstrap_resample

from jax_it import metrics
from jax_it.metrics import bootstrap
from jax_it.metrics.metric import mean


def corpus(examples, seed=0):
    """Predictions that share some words with their one or two references."""
    words = "the a dog cat house runs sleeps in under quickly 7 12 red old of".split()
    draws = random.Random(seed)
    predictions, references = [], []
    for _ in range(examples):
        text = [draws.choice(words) for _ in range(draws.randrange(1, 12))]
        references.append([])
        for _ in range(draws.randrange(1, 3)):
            references[-1].append(" ".join(w if draws.random() < 0.7 else draws.choice(words) for w in text))
        predictions.append(" ".join(text))
    return predictions, references


NAMES = [
    "rouge1", "rougeL", "rougeLsum", "rougeL_chars", "bleu", "bleu_char", "chrf", "ter", "exact_match",
    "squad_f1", "final_number",
]  # fmt: skip


def test_intervals_are_those_of_resampled_texts():
    predictions, references = corpus(12)
    found = metrics.measure(NAMES, predictions, references, {"all": range(12)}, resamples=30, seed=3).intervals["all"]
    counts = bootstrap.draw(np.random.default_rng(3), 30, 12)
    assert (counts.sum(1) == 12).all() and len(np.unique(counts, axis=0)) > 25
    scores = []
    for count in counts.astype(int):
        drawn = np.repeat(np.arange(12), count)
        scores.append(metrics.score(NAMES, [predictions[i] for i in drawn], [references[i] for i in drawn]))
    for name in NAMES:
        expected = np.quantile([score[name] for score in scores], [0.025, 0.975])
        assert found[name] == pytest.approx(tuple(expected), abs=1e-9), name


@pytest.mark.parametrize(
    "name, scorer", [("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF()), ("ter", sacrebleu.TER())]
)
def test_intervals_are_sacrebleus_on_its_resamples(name, scorer, monkeypatch):
    monkeypatch.setitem(os.environ, "SACREBLEU_SEED", "12345")
    predictions, references = corpus(60)
    references = [texts[:1] for texts in references]
    streams = [[texts[0] for texts in references]]
    _, resampled = _bootstrap_resample(scorer._extract_corpus_statistics(predictions, streams), scorer, 1000)
    expected = np.quantile([score.score for score in resampled], [0.025, 0.975])
    measured = metrics.measure([name], predictions, references, {"all": range(60)}, resamples=1000, seed=12345)
    low, high = measured.intervals["all"][name]
    assert (low, high) == pytest.approx(tuple(expected), rel=1e-5)  # its sums are float32
    assert low < measured.metrics["all"][name] < high
    # What it prints, the half width between the 26th score from each end, lies one resample from that.
    printed = scorer.corpus_score(predictions, streams, n_bootstrap=1000)
    assert measured.metrics["all"][name] == pytest.approx(printed.score, abs=1e-9)
    assert (high - low) / 2 == pytest.approx(printed._ci, rel=0.02)


def test_the_interval_of_a_mean_has_the_width_that_statistics_gives_it():
    rows = (np.arange(1000) < 300).astype(float)[:, None]
    low, high = bootstrap.intervals({"share": (mean, rows)})["share"]
    error = math.sqrt(0.3 * 0.7 / 1000)
    # A quantile at 2.5 % of 1,000 draws has a standard error of 0.085 of this; four of them, and the step of a share.
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.34 * error + 1e-3)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.34 * error + 1e-3)


def test_intervals_repeat_with_the_seed_and_do_not_depend_on_the_other_metrics_or_on_blocks(monkeypatch):
    predictions, references = corpus(20)

    def interval(names, seed=0):
        return metrics.measure(names, predictions, references, {"all": range(20)}, seed=seed).intervals["all"]["bleu"]

    assert interval(["bleu"]) == interval(["bleu"]) == interval(["rougeL", "chrf", "bleu"])
    assert interval(["bleu"], seed=1) != interval(["bleu"])
    whole = interval(["bleu"])
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 70)  # 3 resamples at a time
    assert interval(["bleu"]) == whole


def test_equal_examples_have_an_interval_without_width():
    found = metrics.measure(["bleu", "rougeL"], ["the dog"] * 5, [["the dog sat"]] * 5, {"all": range(5)})
    for name, value in found.metrics["all"].items():
        assert found.intervals["all"][name] == pytest.approx((value, value))
