"""What an evaluation found, as files and as text."""

import json
import math

import pytest

from jax_it.errors import UserError
from jax_it.evaluation import examples_text, table, write, write_missing_events
from jax_it.evaluation.results import read
from jax_it.metrics import Result
from jax_it.run_dir import RunDir


def row(task, number, prompt="add 1", prediction="it is 2"):
    references = [f"it is {number}", "another"]
    return {"id": str(number), "task": task, "prompt": prompt, "prediction": prediction, "references": references}


SCORED = Result(
    {
        "sums": {"rougeL": 50.0, "n": 2.0},
        "translation": {"rougeL": 0.25, "n": 1.0},
        "all": {"loss": 1.23456, "n": 3.0, "rougeL": 33.3333},
    },
    [row("sums", 1), row("translation", 2, "à\nla", "ü" * 300), row("sums", 3)],
)


def test_the_table_has_a_line_for_each_task_and_one_for_all():
    assert [line.split() for line in table(SCORED).splitlines()] == [
        ["loss", "rougeL", "n"],
        ["sums", "50.0", "2"],
        ["translation", "0.2", "1"],
        ["all", "1.2346", "33.3", "3"],
    ]
    assert len({len(line) for line in table(SCORED).splitlines()}) == 1


def test_the_examples_show_the_first_of_each_task_on_one_line_each():
    assert examples_text(SCORED).splitlines() == [
        "[sums] add 1",
        "    prediction: it is 2",
        "    reference:  it is 1",
        r"[translation] à\nla",
        "    prediction: " + "ü" * 100 + "…" + "ü" * 99,
        "    reference:  it is 2",
    ]
    assert examples_text(Result(SCORED.metrics, [])) == ""


def test_what_is_written_is_read_back_as_it_was(tmp_path):
    write(tmp_path / "eval" / "3", SCORED)
    written = json.loads((tmp_path / "eval" / "3" / "metrics.json").read_text(encoding="utf-8"))
    assert written.pop("checksum") and written == SCORED.metrics == read(tmp_path / "eval" / "3")
    lines = (tmp_path / "eval" / "3" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == SCORED.predictions
    assert "à" in lines[1]
    assert sorted(file.name for file in (tmp_path / "eval" / "3").iterdir()) == ["metrics.json", "predictions.jsonl"]


def test_scores_that_are_not_finite_or_huge_are_json_and_come_back(tmp_path):
    place = RunDir(tmp_path)
    found = {"all": {"loss": math.nan, "perplexity": math.inf, "own.py:huge": 1e300, "n": 1.0}}
    scored = Result(found, [row("sums", 1) | {"log_probs": [-math.inf, -1.0]}], {"all": {"loss": (math.nan, 2.0)}})
    write(place.eval(3), scored, tmp_path / "board", 3)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for file in ("metrics.json", "predictions.jsonl"):
        json.loads((place.eval(3) / file).read_text(), parse_constant=refuse)
    again = read(place.eval(3))["all"]
    assert math.isnan(again["loss"]) and math.isnan(again["perplexity"]) and again["own.py:huge"] == 1e300
    assert math.isnan(again["loss_ci"][0]) and again["loss_ci"][1] == 2.0
    assert place.scores("loss")(3) is None and math.isnan(place.measured(3, "loss"))
    write_missing_events(tmp_path / "board again", {3: place.eval(3)})
    assert len(list((tmp_path / "board again").iterdir())) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"all": 1}', '{"all": {"loss": 1' + 400 * "0" + "}}", "\0\0", "{"])
def test_damaged_scores_are_no_scores(tmp_path, content):
    place = RunDir(tmp_path)
    place.eval(3).mkdir(parents=True)
    (place.eval(3) / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r".+"):
        read(place.eval(3))
    write_missing_events(tmp_path / "board", {3: place.eval(3)})
    assert place.scores("loss")(3) is None and place.measured(3, "loss") is None
    assert not (tmp_path / "board").exists()


def test_a_digit_that_has_changed_is_noticed_and_a_file_of_an_older_version_is_read(tmp_path, capfd):
    place = RunDir(tmp_path)
    for step, loss in ((3, 1.25), (4, 1.5), (5, 1.75)):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        write(place.eval(step), Result({"all": {"loss": loss}, "checksums": {"loss": math.nan}}, []))
    assert place.choose_step("best", "loss") == 3 and capfd.readouterr().err == ""
    file = place.eval(3) / "metrics.json"
    file.write_text(file.read_text().replace("1.25", "1.26"))
    with pytest.raises(ValueError, match="it has been changed; evaluate again, or delete the checksum line"):
        read(place.eval(3))
    assert place.measured(3, "loss") is None and place.choose_step("best", "loss") == 4
    assert capfd.readouterr().err.startswith(f"{file} cannot be read: it has been changed; ")
    file.write_text('{"all": {"loss": 1.26}}')
    assert read(place.eval(3)) == {"all": {"loss": 1.26}} and place.choose_step("best", "loss") == 3


def test_a_task_may_be_called_checksum(tmp_path):
    write(tmp_path, Result({"checksum": {"loss": 1.0}}, []))
    assert read(tmp_path) == {"checksum": {"loss": 1.0}}


def test_half_a_surrogate_pair_does_not_lose_the_predictions(tmp_path):
    write(tmp_path, Result(SCORED.metrics, [row("sums", 1, prediction="\ud83d")]))
    (line,) = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prediction"] == "\ud83d"


def test_metrics_come_last_so_that_they_say_that_the_step_is_scored(tmp_path):
    (tmp_path / "metrics.json").mkdir()  # in the way
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}: .*; fix that and evaluate again"):
        write(tmp_path, SCORED)
    assert (tmp_path / "predictions.jsonl").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "predictions.jsonl"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "eval").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*eval/3: "):
        write(tmp_path / "eval" / "3", SCORED)


WITH_INTERVALS = Result(
    {
        "sums": {"rougeL": 50.0, "own.py:ratio": 0.12345, "n": 2.0},
        "all": {"loss": 1.23456, "n": 3.0, "rougeL": 33.3333, "without_reference": 1.0},
    },
    [],
    {"sums": {"rougeL": (10.0, 90.5)}, "all": {"rougeL": (12.25, 61.0)}},
    {"all": {"own.py:ratio": "metric 'own.py:ratio' raised KeyError"}},
    "most references are in a script",
)


def test_intervals_stand_beside_their_scores_and_errors_below_them(tmp_path):
    write(tmp_path, WITH_INTERVALS)
    written = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert written.pop("checksum") and written == {
        "sums": {"rougeL": 50.0, "rougeL_ci": [10.0, 90.5], "own.py:ratio": 0.12345, "n": 2.0},
        "all": {
            "loss": 1.23456, "n": 3.0, "rougeL": 33.3333, "rougeL_ci": [12.25, 61.0], "without_reference": 1.0,
            "errors": {"own.py:ratio": "metric 'own.py:ratio' raised KeyError"},
        },
    }  # fmt: skip
    assert list(written["sums"]) == ["rougeL", "rougeL_ci", "own.py:ratio", "n"]


def test_the_table_shows_the_bounds_over_all_and_what_failed():
    lines = table(WITH_INTERVALS).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["loss", "rougeL", "own.py:ratio", "n"],
        ["sums", "50.0", "0.1235", "2"],
        ["all", "1.2346", "33.3", "3"],
        ["95%", "CI", "low", "12.2"],
        ["95%", "CI", "high", "61.0"],
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5:] == [
        "metric 'own.py:ratio' raised KeyError",
        "most references are in a script",
        "1 examples without a reference were skipped",
    ]
