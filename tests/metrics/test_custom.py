"""A user's own metric is a function named in the config; what is wrong with it is one line, and stops no other."""

import sys

import pytest

from jax_it import metrics
from jax_it.errors import UserError

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np

calls = []

@dataclass
class Pair:
    text: str
    references: list[str]

def brevity(predictions, references):
    calls.append(("brevity", len(predictions)))
    return sum(map(len, predictions)) / sum(len(texts[0]) for texts in references)

def lengths(predictions, references):
    calls.append(("lengths", len(predictions)))
    return [len(Pair(p, r).text) for p, r in zip(predictions, references)]

def right(predictions, references):
    return np.array([p in r for p, r in zip(predictions, references)])

def several(predictions, references):
    return {"mean": np.float32(0.5), "length": lengths(predictions, references)}

def fails(predictions, references):
    return 1 / len(predictions[0])

def fails_with_many_lines(predictions, references):
    raise ValueError("one\\ntwo")

def fails_on_one(predictions, references):
    if "!" in predictions:
        raise ValueError("there is a !")
    return len(predictions)

def spoils(predictions, references):
    predictions.clear()
    references[0].clear()
    return 1

def text(predictions, references): return "0.5"
def nothing(predictions, references): return None
def numbers_as_text(predictions, references): return ["1"] * len(predictions)
def not_a_number(predictions, references): return float("nan")
def infinite_example(predictions, references): return [1.0] * (len(predictions) - 1) + [float("inf")]
def too_few(predictions, references): return [1.0]
def square(predictions, references): return np.eye(len(predictions))
def empty_dict(predictions, references): return {}
def odd_keys(predictions, references): return {1: 2.0}
def none_in_dict(predictions, references): return {"a": None}
def ragged(predictions, references): return [[1], [2, 3], 4]
def one_argument(predictions): return 1
def leaves(predictions, references): raise SystemExit(0)
def huge(predictions, references): return [1.0, -1e300, 1.0]
class Odd:
    def __array__(self, *given, **named): raise KeyError("x")
    def __repr__(self): raise KeyError("y")
def odd(predictions, references): return Odd()
def huge_whole(predictions, references): return 10**400
def three_arguments(predictions, references, inputs): return 1
number = 3
"""
PREDICTIONS = ["a b", "c", "!"]
REFERENCES = [["a b"], ["cd", "c"], ["e"]]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file in the current folder, fresh for each test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(SOURCE)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("jax_it_metric:")]:
        del sys.modules[name]
    metrics.custom.load.cache_clear()


def test_a_function_of_a_file_scores_beside_the_others(own):
    names = ["own.py:brevity", "exact_match", f"{own}/own.py:right"]
    metrics.check(names)
    assert metrics.score(names, PREDICTIONS, REFERENCES) == pytest.approx(
        {"own.py:brevity": 5 / 6, "exact_match": 200 / 3, f"{own}/own.py:right": 2 / 3}
    )
    assert metrics.lower_is_better("own.py:brevity") is False


def test_a_function_of_a_module_scores(own, monkeypatch):
    monkeypatch.syspath_prepend(own)
    (own / "package_of_metrics").mkdir()
    (own / "package_of_metrics" / "inner.py").write_text("class M:\n    def __call__(self, p, r): return 2\nm = M()\n")
    (own / "package_of_metrics" / "__init__.py").write_text("")
    assert metrics.score(["package_of_metrics.inner:m"], PREDICTIONS, REFERENCES) == {"package_of_metrics.inner:m": 2}


def test_numbers_by_example_get_a_mean_and_an_interval_and_one_number_only_a_value(own):
    names = ["own.py:lengths", "own.py:brevity", "own.py:several"]
    groups = {"first": [0, 1], "all": range(3)}
    measured = metrics.measure(names, PREDICTIONS, REFERENCES, groups)
    assert measured.metrics["first"] == pytest.approx(
        {"own.py:lengths": 2, "own.py:brevity": 4 / 5, "own.py:several.mean": 0.5, "own.py:several.length": 2}
    )
    assert measured.metrics["all"]["own.py:lengths"] == pytest.approx(5 / 3)
    assert list(measured.intervals["first"]) == ["own.py:lengths", "own.py:several.length"]
    assert measured.intervals["first"]["own.py:lengths"] == (1, 3)  # both the one, or both the other, in a quarter each
    assert "all" not in measured.errors


def test_a_metric_is_called_again_for_a_group_only_where_it_does_not_tell_by_example(own):
    metrics.measure(
        ["own.py:lengths", "own.py:brevity"], PREDICTIONS, REFERENCES, {"a": [0], "b": [1, 2], "all": range(3)}
    )
    calls = metrics.custom.load("own.py:lengths").__globals__["calls"]
    assert calls == [("lengths", 3), ("brevity", 3), ("brevity", 1), ("brevity", 2)]


def test_a_metric_that_raises_is_left_out_with_its_reason_and_stops_no_other(own):
    names = ["own.py:fails_with_many_lines", "rougeL", "own.py:fails_on_one", "own.py:lengths"]
    measured = metrics.measure(names, PREDICTIONS, REFERENCES, {"calm": [0, 1], "all": range(3)})
    assert list(measured.metrics["all"]) == ["rougeL", "own.py:lengths"]
    many = "metric 'own.py:fails_with_many_lines' raised ValueError: one two (own.py, line "
    assert measured.errors["all"]["own.py:fails_with_many_lines"].startswith(many)
    assert "there is a !" in measured.errors["all"]["own.py:fails_on_one"]
    assert measured.metrics["calm"]["own.py:fails_on_one"] == 2
    assert list(measured.errors["calm"]) == ["own.py:fails_with_many_lines"]
    with pytest.raises(UserError, match="one two"):
        metrics.score(names, PREDICTIONS, REFERENCES)


def test_a_reason_says_where_the_metric_failed(own):
    line = SOURCE[: SOURCE.index("return 1 / len")].count("\n") + 1
    with pytest.raises(UserError) as error:
        metrics.score(["own.py:fails"], [""], [["a"]])
    assert str(error.value) == f"metric 'own.py:fails' raised ZeroDivisionError: division by zero (own.py, line {line})"


def test_a_metric_cannot_spoil_the_texts_of_the_others(own):
    names = ["own.py:spoils", "exact_match"]
    measured = metrics.measure(names, PREDICTIONS, REFERENCES, {"a": [0, 1], "all": range(3)})
    assert measured.metrics["all"]["exact_match"] == pytest.approx(200 / 3)
    assert PREDICTIONS == ["a b", "c", "!"] and REFERENCES[0] == ["a b"]


@pytest.mark.parametrize(
    "function, message",
    [
        ("text", "returned '0.5'; expected a number"),
        ("nothing", "returned None; expected a number"),
        ("numbers_as_text", "expected a number"),
        ("ragged", "expected a number"),
        ("not_a_number", "returned nan"),
        ("infinite_example", "returned inf for example 2"),
        ("too_few", "returned 1 numbers for 3 examples"),
        ("square", r"returned an array of shape \[3, 3\] for 3 examples"),
        ("empty_dict", "returned {}; a dict needs"),
        ("odd_keys", "returned {1: 2.0}; a dict needs"),
        ("leaves", r"raised SystemExit: 0 \(own.py, line"),
        ("huge", r"returned -1e\+300; expected 3e\+38 at most"),
        ("huge_whole", "expected a number"),
        ("odd", r"returned a value of type Odd \(.*\); expected a number"),
        ("none_in_dict", "'own.py:none_in_dict.a' returned None"),
    ],
)
def test_what_is_not_a_score_is_refused_in_one_line_that_names_the_metric(own, function, message):
    with pytest.raises(UserError, match=message) as error:
        metrics.score([f"own.py:{function}"], PREDICTIONS, REFERENCES)
    assert f"own.py:{function}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.py:f", r"there is no file missing.py in /"),
        ("/nowhere/missing.py:f", "there is no file /nowhere/missing.py$"),
        ("own.py:brevitty", "has no function 'brevitty'; it has: brevity, lengths"),
        ("own.py:number", "has no function 'number'"),
        ("own.py:", "has no function ''"),
        ("own.py:one_argument", r"must take \(predictions, references\)"),
        ("own.py:three_arguments", r"must take \(predictions, references\): missing a required argument: 'inputs'"),
        ("own:brevity", "No module named 'own'; to take the file, write 'own.py:brevity'"),
        ("no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("no such module:f", "cannot be imported"),
        ("leaving.py:f", r"leaving.py cannot be imported: SystemExit: 0 \(leaving.py, line 1\)"),
        ("~nouser/own.py:f", "~nouser is not a known home folder"),
        ("gs://bucket/own.py:f", "gs:// is not supported here; give a local path"),
        (":f", "cannot be imported"),
        ("broken.py:f", r"broken.py cannot be imported: SyntaxError: .*\(line 2\)"),
        ("raising.py:f", r"raising.py cannot be imported: KeyError: 'x' \(raising.py, line 1\)"),
    ],
)
def test_a_metric_that_is_not_there_is_refused_before_a_run(own, name, message):
    (own / "broken.py").write_text("def f(p, r):\nreturn 1\n")
    (own / "leaving.py").write_text("raise SystemExit(0)\n")
    (own / "raising.py").write_text("{}['x']\ndef f(p, r): return 1\n")
    with pytest.raises(UserError, match=message) as error:
        metrics.check(["rougeL", name])
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_read_once_in_a_process(own):
    before = metrics.score(["own.py:lengths"], PREDICTIONS, REFERENCES)
    (own / "own.py").write_text("def lengths(p, r): return 0")
    assert metrics.score(["own.py:lengths"], PREDICTIONS, REFERENCES) == before
