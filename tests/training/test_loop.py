"""Whole runs on the built-in data with a very small model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jax_it import config as settings
from jax_it.config import resolve
from jax_it.errors import UserError
from jax_it.run_dir import RunDir
from jax_it.training import dry_run, loop, step, train

TINY = {"model_type": "t5", "vocab_size": 120, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
LLAMA = {
    "model_type": "llama", "vocab_size": 120, "hidden_size": 16, "head_dim": 8, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def make_config(tmp_path, **changes):
    tree = settings.to_dict(settings.Config())
    tree["model"] |= {"pretrained": False, "architecture": TINY, "tokenizer": "train", "tokenizer_size": 120}
    tree["data"] |= {
        "train": [{"path": "builtin:instructions", "limit": 60}],
        "eval": [{"path": "builtin:instructions", "split": "test", "limit": 10}],
        "cache_dir": str(tmp_path / "cache"),
        "max_truncated": 1.0,
    }
    tree["train"] |= {"duration": "6 steps", "batch_size": 8, "log_every": "1 steps", "checkpoint_every": "3 steps"}
    tree["mesh"] |= {"data": 2, "fsdp": 2, "tensor": 2}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        tree[section][field] = value
    if tree["model"]["architecture"]["model_type"] == "t5":
        tree["data"] |= {"max_source_length": 128, "max_target_length": 64}
    return resolve(tree)


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's config, folder and last state."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(folder)
    return config, folder / "run", train(config, folder / "run")


def test_a_run_logs_every_step_and_keeps_its_checkpoints(finished):
    _, run, state = finished
    lines = logged(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(
        np.isfinite(line["loss"]) and 0 < line["source_fill"] <= 1 and line["flops_per_second"] > 0 for line in lines
    )
    assert all(0 < line["goodput"] < 1 and line["host_memory"] > 1e7 for line in lines)
    assert RunDir(run).checkpoints().steps() == [3, 6]
    assert int(state.step) == 6
    assert list((run / "tensorboard").iterdir())
    shares = json.loads((run / "goodput.json").read_text())["seconds"]
    assert shares["compiling"] > 0 and shares["stepping"] > 0 and shares["saving"] > 0 and not shares["lost"]


def test_training_lowers_the_loss(tmp_path):
    fast = settings.to_dict(
        settings.Optimizer(learning_rate=0.01, schedule="constant", warmup=settings.Duration(0, "steps"))
    )
    train(make_config(tmp_path, train__duration="30 steps", train__optimizer=fast), tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_a_run_in_epochs_trains_on_every_example_once_an_epoch(tmp_path):
    train(make_config(tmp_path, train__duration="2 epochs"), tmp_path / "run")
    assert sum(line["examples"] for line in logged(tmp_path / "run")) == 2 * 60


def test_a_finished_run_started_again_does_nothing(finished):
    config, run, first = finished
    before = (run / "metrics.jsonl").read_text()
    second = train(config, run)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first.params), jax.device_get(second.params))
    assert (run / "metrics.jsonl").read_text() == before


def test_evaluation_in_the_loop_scores_the_start_the_interval_and_the_end(tmp_path):
    config = make_config(
        tmp_path, eval__at_start=True, eval__every="4 steps", eval__metrics=["rougeL"], eval__max_new_tokens=4
    )
    train(config, tmp_path / "run")
    found = {
        int(folder.name): json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path / "run" / "eval").iterdir()
    }
    assert sorted(found) == [0, 4, 6]
    assert all(scores["all"]["n"] == 10 and "rougeL" in scores["all"] for scores in found.values())


@pytest.mark.parametrize(
    "name", ["adafactor", pytest.param("lion", marks=pytest.mark.slow), pytest.param("sgd", marks=pytest.mark.slow)]
)
def test_every_optimizer_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path, name):
    optimizer = {**settings.to_dict(settings.Optimizer(learning_rate=1e-3)), "name": name}
    whole = make_config(tmp_path, train__optimizer=optimizer)
    train(whole, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")  # as a run killed after its third step leaves it
    train(whole, tmp_path / "cut")
    assert [line["loss"] for line in logged(tmp_path / "cut")] == [line["loss"] for line in logged(tmp_path / "whole")]


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param({}, id="all weights"),
        # tests/test_adapted_run.py resumes a run of adapters in the default tests
        pytest.param({"rank": 2, "dora": True, "dropout": 0.1}, id="adapters", marks=pytest.mark.slow),
    ],
)
def test_a_causal_run_is_evaluated_and_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path, lora):
    config = make_config(
        tmp_path, model__architecture=LLAMA, model__lora=lora, data__max_seq_length=192,
        eval__every="6 steps",
        eval__max_new_tokens=4, eval__metrics=["rougeL"],
    )  # fmt: skip
    state = train(config, tmp_path / "whole")
    lines = logged(tmp_path / "whole")
    assert all(np.isfinite(line["loss"]) and 0 < line["target_fill"] <= 1 for line in lines)
    assert all("source_fill" not in line for line in lines)  # it has no source
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    again = train(config, tmp_path / "cut")
    assert [line["loss"] for line in logged(tmp_path / "cut")] == [line["loss"] for line in lines]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.frozen), jax.device_get(state.frozen))
    assert bool(state.frozen) == bool(lora)
    scores = json.loads((tmp_path / "whole" / "eval" / "6" / "metrics.json").read_text())["all"]
    assert scores["n"] == 10 and np.isfinite(scores["loss"])


def missing(tmp_path):
    return [{"path": str(tmp_path / "nowhere.jsonl"), "template": ["auto"]}]


def empty(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    return [{"path": str(tmp_path / "empty.jsonl")}]


def task(tmp_path):
    return [{"name": "own", "data": missing(tmp_path)[0], "metrics": ["exact_match"]}]


@pytest.mark.parametrize(
    "changes, named",
    [
        (lambda folder: {"data__eval": missing(folder)}, "config.data.eval.0.*nowhere.jsonl"),
        (lambda folder: {"data__eval": empty(folder)}, "empty.jsonl.*config.data.eval.0"),
        (lambda folder: {"eval__tasks": task(folder)}, "config.eval.tasks.0.*nowhere.jsonl"),
        (lambda folder: {"eval__every": "2 steps", "eval__tasks": task(folder)}, "config.eval.tasks.0.*nowhere.jsonl"),
        (lambda folder: {"eval__metrics": ["rougeL", "my_metrics.py:brevity"]}, "my_metrics.py"),
    ],
    ids=["missing", "empty", "task", "task within", "metric"],
)
def test_what_an_evaluation_would_lack_is_named_before_the_first_step(tmp_path, monkeypatch, changes, named):
    """Also where there is no evaluation within the run."""
    monkeypatch.setattr(loop, "_restore_or_start", None)  # where the first weights would be made
    with pytest.raises(UserError, match=named):
        train(make_config(tmp_path, **changes(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def config_json(run):
    return json.loads((run / "config.json").read_text())


def test_a_finished_run_trains_longer_and_with_another_rate_where_that_is_asked_for(finished, tmp_path, capfd):
    config, run, _ = finished
    run = shutil.copytree(run, tmp_path / "run")
    optimizer = dataclasses.replace(config.train.optimizer, learning_rate=1e-3)
    train_ = dataclasses.replace(config.train, duration=settings.Duration(9, "steps"), optimizer=optimizer)
    longer = dataclasses.replace(config, train=train_)
    with pytest.raises(
        UserError, match=r"config.train.duration='6 steps', not '9 steps'; add --allow-change train.dur"
    ):
        train(longer, run)
    with pytest.raises(UserError, match=r"config.train.optimizer.learning_rate=0.0003, not 0.001; add --allow-change"):
        train(longer, run, ["train.duration"])
    before = config_json(run)
    names = ["train.duration", "train.optimizer.learning_rate"]
    state = train(longer, run, names)
    assert int(state.step) == 9 and [line["step"] for line in logged(run)] == [*range(1, 10)]
    assert "config.train.duration is '9 steps' after step 6; it was '6 steps'" in capfd.readouterr().err
    after = config_json(run)
    assert after["changes"] == [
        {"after_step": 6, "train.duration": ["6 steps", "9 steps"], "train.optimizer.learning_rate": [3e-4, 1e-3]}
    ]
    assert after["resolved"] == before["resolved"] | {"total_steps": 9}
    after["config"]["train"]["duration"], after["config"]["train"]["optimizer"]["learning_rate"] = "6 steps", 3e-4
    assert after["config"] == before["config"]
    assert int(train(longer, run).step) == 9  # it is the run's config now
    shorter = dataclasses.replace(longer, train=dataclasses.replace(train_, duration=settings.Duration(5, "steps")))
    with pytest.raises(UserError, match=r"config.train.duration: the run in .* is at step 9, past 5"):
        train(shorter, run, names)


def test_what_may_not_change_within_a_run_is_refused_by_name(finished):
    config, run, _ = finished
    for name in ("data.train", "train.batch_size", "model.architecture", "train.optimizer", "duration"):
        with pytest.raises(
            UserError,
            match=rf"--allow-change {name}: this cannot change during a run. You can change: train.duration, ",
        ):
            train(config, run, [name])


@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["all weights", "adapters"])
def test_a_dry_run_says_what_training_would_do_and_leaves_nothing(tmp_path, lora):
    config = make_config(tmp_path, eval__every="2 steps", model__lora=lora)
    report = dry_run(config, tmp_path / "run")
    assert "8 cpu device(s), steps 1 to 6 of about 8 examples: " in report
    assert "a checkpoint every 3 steps, an evaluation every 2 steps; a checkpoint takes up to 0.00 GB" in report
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_run_refuses_what_continuing_it_would_and_leaves_it_as_it_is(finished, tmp_path, monkeypatch):
    config, run, _ = finished
    run = shutil.copytree(run, tmp_path / "run")

    def found():
        return sorted((file, file.stat().st_mtime) for file in run.rglob("*") if file.name != ".lock")

    before = found()
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=4))
    with pytest.raises(UserError, match=r"config.train.batch_size=8, not 4"):
        dry_run(other, run)
    assert "steps 7 to 6" not in dry_run(config, run)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 10_000))
    with pytest.raises(UserError, match=r"GB free and a checkpoint takes up to"):
        dry_run(config, run)
    assert found() == before


def test_a_disk_without_room_for_a_checkpoint_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 10_000))
    with pytest.raises(UserError, match=r"run has 0.0 GB free and a checkpoint takes up to 0.0 GB; free space or name"):
        train(make_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_new_run_whose_first_step_fails_leaves_nothing(tmp_path, monkeypatch):
    """As one that does not fit into the memory."""

    def failing(*arguments):
        return lambda state, batch: 1 // 0

    monkeypatch.setattr(step, "make_train_step", failing)
    with pytest.raises(ZeroDivisionError):
        train(make_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
