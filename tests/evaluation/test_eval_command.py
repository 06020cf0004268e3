"""`jax-it eval` of a checkpoint and of any model: what is scored, where the scores go, and what is refused."""

import json

import pytest

from jax_it import config as settings
from jax_it.cli import main
from jax_it.errors import UserError
from jax_it.evaluation.evaluate import EvalOptions
from tests.tiny_run import copy, fails, succeeds, write_rows

OTHER = """
from jax_it import config as defaults


def get_config(arg=""):
    config = defaults.default()
    config.data.eval = ({{"path": "{file}", "name": "other"}},)
    config.eval.generate = False
    config.eval.run_model_code = True
    config.eval.limit = int(arg or 0)
    return config
"""


@pytest.fixture
def run(finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    del saved["checksum"]  # the change is meant
    saved["config"]["eval"]["generate"] = False
    (run / "config.json").write_text(json.dumps(saved))
    return run


@pytest.fixture
def other(tmp_path):
    """A config file that has an evaluation and cannot be trained with."""
    rows = write_rows(tmp_path / "other.jsonl", [{"prompt": f"say {i}", "completion": str(i)} for i in range(5)])
    file = tmp_path / "other.py"
    file.write_text(OTHER.format(file=rows))
    return file


def scores(folder):
    return json.loads((folder / "metrics.json").read_text())


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_config_files_scores_lie_beside_the_runs_own_under_its_name(run, other, capfd):
    succeeds(capfd, "eval", "--workdir", run)
    own = (run / "eval" / "60" / "metrics.json").read_bytes()
    shown = succeeds(capfd, "eval", "--workdir", run, "--config", other)
    assert shown.startswith("step 60\n") and scores(run / "eval" / "60" / "other")["all"]["n"] == 5
    succeeds(capfd, "eval", "--workdir", run, "--config", f"{other}:3", "--checkpoint", 45)
    assert scores(run / "eval" / "45" / "other-3")["all"]["n"] == 3
    assert (run / "eval" / "60" / "metrics.json").read_bytes() == own
    boards = run / "tensorboard" / "eval"
    assert files(boards) == [
        "events.out.tfevents.0000000060.scores",
        "other-3/events.out.tfevents.0000000045.scores",
        "other/events.out.tfevents.0000000060.scores",
    ]


def test_changed_settings_need_a_folder_of_their_own_unless_they_leave_the_scores_alone(run, tmp_path, capfd):
    command = ("eval", "--workdir", run, "--config.eval.limit=2")
    line = fails(capfd, *command)
    assert line.endswith(
        f"the run in {run} is scored with other settings, and the scores would not be comparable; "
        "name another folder for these with --output"
    )
    assert not (run / "eval").exists()
    succeeds(capfd, *command, "--output", tmp_path / "out")
    assert scores(tmp_path / "out" / "60")["all"]["n"] == 2 and not (run / "eval").exists()
    line = fails(capfd, *command, "--output", tmp_path / "out")
    assert line.endswith("out/60/metrics.json exists already; move it away, or name another --output")
    succeeds(capfd, "eval", "--workdir", run, "--config.eval.batch_size=2")
    assert scores(run / "eval" / "60")["all"]["n"] == 7


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_scored(run, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    line = fails(capfd, "eval", "--workdir", run, "--output", tmp_path / "file")
    assert line.endswith("file/60: Not a directory; name another folder with --output")
    (run / "eval").write_text("")
    assert "cannot write to" in fails(capfd, "eval", "--workdir", run)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--config.train.seed=1",), "--config.train.seed: jax-it eval can only change eval and data.eval"),
        (("--config.eval.limt=1",), "config.eval.limt is not a setting"),
        (("--timeout", "3"), "--timeout needs --follow"),
        (("--json", "x"), "--json needs --summary"),
        (("--follow", "--summary"), "not allowed with argument --follow"),
        (("--follow", "--checkpoint", "45"), "not allowed with argument --follow"),
        (("--model", "x"), "not allowed with argument --workdir"),
        (("--checkpoint", "7"), "--checkpoint 7: "),
        (("--config", "nowhere.py"), "config file nowhere.py does not exist"),
    ],
)
def test_what_cannot_be_understood_is_refused(run, capfd, options, message):
    assert message in fails(capfd, "eval", "--workdir", run, *options)


@pytest.mark.parametrize("options", [(), ("--summary",)])
def test_a_folder_that_holds_no_run_is_named(tmp_path, capfd, options):
    assert f"{tmp_path} is not a run directory (no config.json)" in fails(
        capfd, "eval", "--workdir", tmp_path, *options
    )


def test_a_source_that_cannot_be_read_costs_only_its_own_scores(run, other, tmp_path, capfd):
    line = "    config.eval.generate"
    text = other.read_text().replace(line, f'    config.data.eval += ({{"path": "gone.jsonl"}},)\n{line}')
    other.write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--workdir", str(run), "--config", str(other)])
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and "\ngone: config.data.eval.1" in out
    assert err.splitlines()[-1].startswith("jax-it eval: gone: config.data.eval.1")
    found = scores(run / "eval" / "60" / "other")
    assert found["all"]["n"] == 5 and "gone.jsonl" in found["gone"]["errors"]["task"]


def test_where_nothing_can_be_read_nothing_is_written(run, other, capfd):
    other.write_text(other.read_text().replace("other.jsonl", "gone.jsonl"))
    assert "gone.jsonl" in fails(capfd, "eval", "--workdir", run, "--config", other)
    assert not (run / "eval").exists()


def test_a_model_is_scored_as_the_run_that_it_was_exported_from(run, other, tmp_path, capfd):
    succeeds(capfd, "export", "--workdir", run, "--output", tmp_path / "model")
    lengths = ("--config.data.max_source_length=32", "--config.data.max_target_length=16")
    succeeds(
        capfd, "eval", "--model", tmp_path / "model", "--config", other, *lengths, "--output", tmp_path / "of-model"
    )
    assert files(tmp_path / "of-model") == ["metrics.json", "predictions.jsonl"]
    succeeds(capfd, "eval", "--model", run, "--config", other, *lengths, "--output", tmp_path / "of-run")
    succeeds(capfd, "eval", "--workdir", run, "--config", other)
    expected = scores(run / "eval" / "60" / "other")["all"]
    for folder in ("of-model", "of-run"):
        assert scores(tmp_path / folder)["all"] == pytest.approx(expected, rel=1e-5)
    command = ("eval", "--model", tmp_path / "model", "--config", other)
    assert "metrics.json exists already" in fails(capfd, *command, "--output", tmp_path / "of-model")
    (tmp_path / "of-model" / "metrics.json").unlink()
    assert "predictions.jsonl exists already" in fails(capfd, *command, "--output", tmp_path / "of-model")
    assert "--model needs --output" in fails(capfd, *command)
    assert "are for a run: name it with --workdir" in fails(capfd, *command, "--output", "x", "--summary")


def test_a_model_needs_something_to_be_scored_on(run, tmp_path, capfd):
    line = fails(capfd, "eval", "--model", run, "--output", tmp_path / "out")
    assert "has nothing to evaluate on: set config.data.eval, config.data.validation_size or config.eval.tasks" in line


@pytest.fixture
def ran(run, tmp_path):
    """A file that is there once the metric that the run's config names has run."""
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(predictions, references): return 1\n"
    )
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["eval"]["metrics"] = ["rougeL", f"{tmp_path}/own.py:f"]
    (run / "config.json").write_text(json.dumps(saved))
    return tmp_path / "ran"


@pytest.mark.parametrize("option", [(), ("--follow",), ("--config.eval.batch_size=2",)])
def test_python_that_a_runs_config_names_as_a_metric_runs_only_where_the_user_allows_it(run, ran, capfd, option):
    line = fails(capfd, "eval", "--workdir", run, *option)
    assert f"the run in {run} uses Python code, '{ran.parent}/own.py:f', as a metric, which would run" in line
    assert "add --run-metric-code" in line and not ran.exists()


def test_a_folder_of_lm_evals_tasks_that_a_runs_config_names_is_code_too(run, capfd):
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["eval"]["tasks"] = [{"name": "mine", "score": "lm_eval", "data": {"path": "folder"}}]
    (run / "config.json").write_text(json.dumps(saved))
    line = fails(capfd, "eval", "--workdir", run)
    assert (
        f"the run in {run} uses Python code, in 'folder', for tasks of lm_eval" in line
        and "add --run-metric-code" in line
    )


def test_python_that_the_user_names_or_allows_runs(run, ran, other, tmp_path, capfd):
    metric = f"{ran.parent}/own.py:f"
    text = other.read_text().replace("config.eval.limit", f"config.eval.metrics = ({metric!r},)\n    config.eval.limit")
    other.write_text(text)
    succeeds(capfd, "eval", "--workdir", run, "--config", other)
    assert ran.exists()
    succeeds(capfd, "eval", "--workdir", run, "--summary")
    succeeds(capfd, "eval", "--workdir", run, "--run-metric-code")
    named = ("--config.eval.metrics=['rougeL']", "--output", tmp_path / "out")
    succeeds(capfd, "eval", "--workdir", run, *named)


def test_a_config_file_runs_once(other, tmp_path):
    ran = tmp_path / "ran"
    other.write_text(f"open({str(ran)!r}, 'a').write('once ')\n{other.read_text()}")
    request = EvalOptions(str(other), {"eval.limit": "3"})
    own = settings.Config(model=settings.Model(path="a model"))
    first, second = request.resolve(own), request.resolve(own)
    assert first == second and first.eval.limit == 3
    assert ran.read_text() == "once "


def test_no_file_allows_by_itself_that_model_code_is_run(other):
    own = settings.Config(model=settings.Model(path="x"))
    for request, allowed in (
        (EvalOptions(str(other)), False),
        (EvalOptions(str(other), run_model_code=True), True),
        (EvalOptions(str(other), {"eval.run_model_code": "true"}), True),
        (EvalOptions(), False),
    ):
        assert request.resolve(own).eval.run_model_code is allowed


@pytest.mark.parametrize(
    "config, name", [("", ""), ("configs/mmlu.py", "mmlu"), ("mmlu.py:x", "mmlu-x"), ("m.py:a/b ../c", "m-a_b_.._c")]
)
def test_the_name_of_an_evaluation_is_that_of_its_file_and_argument(config, name):
    assert EvalOptions(config).name == name


def test_settings_of_a_file_that_are_wrong_name_the_field(other):
    other.write_text(other.read_text().replace("config.eval.generate = False", "config.eval.batch_size = 0"))
    with pytest.raises(UserError, match=r"config.eval.batch_size: 0 must be at least 1"):
        EvalOptions(str(other)).resolve(settings.Config(model=settings.Model(path="x")))
