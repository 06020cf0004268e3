"""All scored steps of a run in one table."""

import csv
import json

import pytest

from jax_it.evaluation.evaluate import EvalOptions
from jax_it.evaluation.summary import summarize, text
from tests.tiny_run import copy, fails, succeeds


def write(run, step, scores, name=""):
    folder = run / "eval" / str(step) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(scores))


def over_all(loss, **more):
    return {"all": {"loss": loss, "n": 7.0, "without_reference": 0.0, "truncated": 1.0, **more}}


@pytest.fixture
def run(finished, tmp_path):
    """A run with checkpoints 45 and 60, and scores from step 9 on."""
    run = copy(finished, tmp_path / "run")
    write(run, 9, over_all(2.5) | {"first": {"rougeL": 1.0, "n": 4.0}})
    write(run, 45, over_all(1.25, rougeL=33.25, rougeL_ci=[1.0, 50.0]) | {"first": {"rougeL": 12.25, "n": 4.0}})
    write(run, 100, over_all(1.5, rougeL=40.0) | {"mmlu": {"accuracy": 25.0}, "mmlu/law": {"accuracy": 9.0}})
    return run


def rows(shown):
    return [line.split() for line in shown.splitlines()]


def test_steps_are_rows_in_their_order_and_the_best_is_marked(run):
    shown = text(summarize(run))
    assert rows(shown)[:5] == [
        ["all", "first", "mmlu"],
        ["step", "loss", "rougeL", "rougeL", "accuracy"],
        ["9", "2.5000", "1.0"],
        ["*", "45", "1.2500", "33.2", "12.2"],
        ["100", "1.5000", "40.0", "25.0"],
    ]
    lines = shown.splitlines()
    assert lines[5] == "* best by loss: step 45, whose checkpoint is kept"
    assert lines[6] == "checkpoints without scores: 60" and len(lines) == 7
    ends = [lines[1].index(name) + len(name) for name in ("step", "loss")]
    assert all(line[end - 1] != " " for line in lines[2:5] for end in ends)


def test_the_best_is_that_of_the_metric_which_the_config_names(run):
    found = summarize(run, EvalOptions(changes={"eval.best": "rougeL"}))
    assert found.best == 100
    assert "* best by rougeL: step 100, whose checkpoint is not kept" in text(found)
    found = summarize(run, EvalOptions(changes={"eval.best": "exact_match"}))
    assert found.best is None and "no step has a score by exact_match" in text(found)


def test_files_that_cannot_be_read_are_named_and_cost_only_their_own_row(run):
    (run / "eval" / "45" / "metrics.json").write_text('{"all": {"loss"')
    write(run, 50, [1])
    (run / "eval" / "55").mkdir()  # not scored yet
    shown = text(summarize(run))
    assert [line[0] for line in rows(shown)[2:4]] == ["9", "*"]
    for step in (45, 50):
        assert f"{run}/eval/{step}/metrics.json cannot be read: " in shown
    assert "/55/" not in shown


def test_a_task_that_failed_says_so_in_its_cell_and_below(run):
    write(run, 110, over_all(3.0) | {"mmlu": {"errors": {"task": "it has no file"}}})
    shown = text(summarize(run))
    assert rows(shown)[5] == ["110", "3.0000", "failed"]
    assert "step 110: mmlu: it has no file" in shown.splitlines()


def test_many_tasks_are_in_the_files_alone(run, tmp_path):
    write(run, 9, over_all(2.5) | {f"task {i}": {"rougeL": 1.0} for i in range(20)})
    shown = text(summarize(run))
    lines = shown.splitlines()
    assert max(map(len, lines[:5])) <= 160
    hidden = 22 - lines[0].count("task") - lines[0].count("first") - lines[0].count("mmlu")
    assert hidden > 0 and f"{hidden} more tasks are in the files of --csv and --json" in lines


def test_a_long_name_of_a_task_is_cut_in_its_middle(run):
    write(run, 9, over_all(2.5) | {"adversarial_qa_dbidaf_based_on": {"rougeL": 1.0}})
    assert text(summarize(run)).splitlines()[0].split()[1] == "adversaria…_based_on"


def test_a_run_without_scores_says_so(finished):
    shown = text(summarize(finished))
    assert shown.splitlines() == ["no step is scored yet", "checkpoints without scores: 45, 60"]


def test_other_evaluations_are_named_and_shown_on_request(run, tmp_path):
    (tmp_path / "mmlu.py").write_text(
        "from jax_it import config\n\n\ndef get_config(arg=''):\n    return config.default()\n"
    )
    write(run, 45, {"all": {"loss": 9.0}}, "mmlu")
    shown = text(summarize(run))
    assert shown.splitlines()[-1] == "scores by other config files (--config): mmlu"
    assert rows(text(summarize(run, EvalOptions(str(tmp_path / "mmlu.py")))))[:3] == [
        ["all"],
        ["step", "loss"],
        ["*", "45", "9.0000"],
    ]
    write(tmp_path, 7, {"all": {"loss": 8.0}})
    assert list(summarize(run, EvalOptions(output=str(tmp_path / "eval"))).scores) == [7]


def test_the_files_hold_what_the_table_shows_and_more(run, tmp_path, capfd):
    table, listed = tmp_path / "scores.csv", tmp_path / "scores.json"
    shown = succeeds(capfd, "eval", "--workdir", run, "--summary", "--csv", table, "--json", listed)
    assert "* best by loss: step 45" in shown
    with table.open() as file:
        found = list(csv.DictReader(file))
    assert [(row["step"], row["best"], row["all/loss"]) for row in found] == [
        ("9", "0", "2.5"),
        ("45", "1", "1.25"),
        ("100", "0", "1.5"),
    ]
    assert (found[1]["all/rougeL_ci_low"], found[1]["all/rougeL_ci_high"]) == ("1.0", "50.0")
    assert found[0]["mmlu/law/accuracy"] == "" and found[2]["mmlu/law/accuracy"] == "9.0"
    objects = json.loads(listed.read_text())
    assert [(row["step"], row["best"], row["checkpoint"]) for row in objects] == [
        (9, False, False),
        (45, True, True),
        (100, False, False),
    ]
    assert objects[2]["scores"]["mmlu/law"] == {"accuracy": 9.0}
    line = fails(capfd, "eval", "--workdir", run, "--summary", "--csv", tmp_path / "nowhere" / "x.csv")
    assert line.endswith("nowhere/x.csv: it must be a file in a folder that exists")
