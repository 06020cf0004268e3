"""All metrics alike: what they take, what they give, what they refuse."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_it import metrics
from jax_it.errors import UserError
from jax_it.metrics.metric import Metric, mean
from tests.metrics.texts import PREDICTIONS, RAGGED, REFERENCES

# All but those that need packages or a file of their own, and those whose references are no texts to compare with.
EVERYWHERE = [name for name in metrics.METRICS if name not in ("bleu_ja", "bleu_ko", "bleu_flores200")]


def test_scores_of_examples_are_averaged():
    scores = metrics.score(["exact_match", "token_f1"], ["a b", "c d"], [["b"], ["c d"]])
    assert scores == {"exact_match": 50, "token_f1": 100}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=3)), min_size=1, max_size=3
    )
)
def test_every_score_of_any_text_is_from_0_to_100(examples):
    scores = metrics.score(EVERYWHERE, [text for text, _ in examples], [texts for _, texts in examples])
    assert list(scores) == EVERYWHERE
    for name, value in scores.items():
        assert type(value) is float and math.isfinite(value) and value >= 0
        assert value <= 100 + 1e-9 or metrics.lower_is_better(name)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_perfect_prediction_has_the_best_score(name):
    text = "The quick brown fox jumps over 13 lazy dogs."
    best = 0 if metrics.lower_is_better(name) else 100
    assert metrics.score([name], [text], [["Something else.", text]])[name] == pytest.approx(best)


@pytest.mark.parametrize("name, close", [("rougel", "rougeL"), ("ROUGE-L", "rougeL"), ("F1", None), ("BLUE", "bleu")])
def test_an_unknown_metric_is_refused_with_the_closest_and_the_list(name, close):
    with pytest.raises(UserError) as error:
        metrics.score(["bleu", name], PREDICTIONS, REFERENCES)
    message = str(error.value)
    assert repr(name) in message and "\n" not in message and all(known in message for known in metrics.METRICS)
    assert (f"did you mean {close!r}?" in message) if close else ("did you mean" not in message)


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([], [], "no predictions"),
        (["a"], [["a"], ["b"]], "1 predictions and 2 lists"),
        (["a", "b"], [["a"], []], "example 1"),
        (["a"], ["a"], "example 0"),
    ],
)
@pytest.mark.parametrize("name", ["rougeL", "bleu", "exact_match"])
def test_examples_that_cannot_be_scored_are_refused(name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metrics.score([name], predictions, references)


def test_importing_metrics_does_not_import_what_only_rouge_needs():
    code = "import sys, jax_it.metrics; sys.exit('nltk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


TASKS = {"pets": [4, 0, 2], "rest": [3, 1], "one": [2], "all": range(5)}


def test_groups_of_examples_are_scored_as_if_alone_and_each_text_is_cut_once(monkeypatch):
    calls = []
    monkeypatch.setitem(
        metrics.METRICS,
        "exact_match",
        Metric(lambda texts, _: calls.append(texts) or np.array([[float(len(text))] for text in texts]), mean),
    )
    measured = metrics.measure(EVERYWHERE, PREDICTIONS, RAGGED, TASKS)
    assert list(measured.metrics) == list(TASKS) and calls == [PREDICTIONS]
    for task, chosen in TASKS.items():
        expected = metrics.score(EVERYWHERE, [PREDICTIONS[i] for i in chosen], [RAGGED[i] for i in chosen])
        assert measured.metrics[task] == pytest.approx(expected, abs=1e-9)
        assert list(measured.metrics[task]) == EVERYWHERE
        assert task not in measured.errors


def test_a_group_without_examples_is_refused():
    with pytest.raises(ValueError, match="group 'none'"):
        metrics.measure(["bleu"], PREDICTIONS, RAGGED, TASKS | {"none": []})


def test_every_metric_has_an_interval_from_two_examples_on():
    measured = metrics.measure(EVERYWHERE, PREDICTIONS, RAGGED, TASKS)
    for task in ("pets", "rest", "all"):
        assert list(measured.intervals[task]) == EVERYWHERE
        for low, high in measured.intervals[task].values():
            assert type(low) is float and math.isfinite(low) and low <= high
    low, high = measured.intervals["all"]["rougeL"]
    assert low < measured.metrics["all"]["rougeL"] < high
    assert "one" not in measured.intervals
    assert metrics.measure(["bleu"], PREDICTIONS, RAGGED, TASKS, resamples=0).intervals == {}
