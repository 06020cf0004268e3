"""A run that is stopped anywhere, by anything, continues with the same command and repeats the losses bit for bit."""

import dataclasses
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from jax_it import config as settings
from jax_it import evaluation, training
from jax_it.config import Mesh
from jax_it.errors import Interrupted
from jax_it.metrics import Result
from jax_it.run import open_run
from jax_it.run_dir import RunDir
from jax_it.sharding import make_mesh
from tests.tiny_run import STEPS, copy, losses, start, succeeds


def wait_for(process, run, pattern):
    """Returns when a file that fits the pattern is in the run's folder."""
    while not any(run.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)


def stop(process, how=signal.SIGKILL):
    """Its output. Where it is told to stop, it must end with the code that means "run the same command to continue"."""
    process.send_signal(how)
    output = process.communicate()[0]
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGINT: 130}.get(how, -how), output
    return output


def finish(config, run):
    """The output of the command that takes the run to its end."""
    process = start("train", "--config", config, "--workdir", run)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def weights(run):
    return dataclasses.replace(open_run(RunDir(run)), mesh=make_mesh(Mesh(data=1), jax.devices()[:1])).load_params(
        STEPS
    )


def assert_same_run(run, reference):
    assert losses(run) == losses(reference)
    kept = sorted(file.name for file in (run / "checkpoints").iterdir())
    assert kept == sorted(file.name for file in (reference / "checkpoints").iterdir())
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), weights(run), weights(reference)))
    leftovers = [file for file in run.rglob("*") if "tmp" in file.name or file.name.endswith(".part")]
    assert not leftovers


def test_a_run_that_is_stopped_again_and_again_is_the_run_that_was_not(config, finished, tmp_path):
    run = tmp_path / "run"

    process = start("train", "--config", config, "--workdir", run)
    wait_for(process, run, "model/*")  # the folder is being made, or has just become a run
    time.sleep(random.Random(0).uniform(0, 0.02))
    stop(process)

    process = start("train", "--config", config, "--workdir", run)
    assert f"steps 1 to {STEPS}" in process.stdout.readline()  # the first step is being compiled
    assert "before there was a new step to save; run the same command to continue" in stop(process, signal.SIGTERM)
    assert losses(run) == []

    for step, how, name in ((3, signal.SIGTERM, "SIGTERM"), (19, signal.SIGINT, "Ctrl-C")):
        process = start("train", "--config", config, "--workdir", run)
        while not process.stdout.readline().startswith(f"step {step}/"):
            assert process.poll() is None
        output = stop(process, how)
        saved = len(losses(run))
        assert (
            f"stopped by {name} after step {saved}, which is saved; run the same command to continue from there"
            in output
        )
        assert RunDir(run).checkpoints().steps()[-1] == saved < STEPS

    process = start("train", "--config", config, "--workdir", run)
    wait_for(process, run, "checkpoints/*tmp*")  # a checkpoint is being written
    assert f"steps {saved + 1} to {STEPS}" in stop(process)

    finish(config, run)
    assert_same_run(run, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_run_that_is_killed_at_any_time_is_the_run_that_was_not(config, finished, tmp_path, seed):
    run = tmp_path / "run"
    begin = time.monotonic()
    finish(config, tmp_path / "timed")
    length = time.monotonic() - begin
    moments = random.Random(seed)
    for _ in range(4):
        process = start("train", "--config", config, "--workdir", run)
        time.sleep(moments.uniform(0.3, 1) * length)
        stop(process)
    finish(config, run)
    assert_same_run(run, finished)


def test_sigterm_during_an_evaluation_saves_its_step_and_the_evaluation_is_done_when_the_run_goes_on(
    config, tmp_path, monkeypatch
):

    class Suite:
        def __init__(self, *arguments):
            pass

        def __call__(self, params, should_stop):
            scored.append(should_stop())
            if len(scored) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                if should_stop():
                    raise evaluation.Stopped
            return Result({"all": {"loss": 1.0, "n": 1.0}}, [])

    def step(state, batch):
        measured = ("loss", "weight", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row")
        return replace(state, step=state.step + 1), dict.fromkeys(measured, 0.0)

    scored = []
    monkeypatch.setattr(evaluation.suite, "Suite", Suite)
    monkeypatch.setattr(training.step, "make_train_step", lambda *arguments: step)
    run = tmp_path / "run"
    changes = {"eval.every": "4 steps", "train.checkpoint_every": "3 steps", "train.duration": "6 steps"}
    with pytest.raises(
        Interrupted, match="stopped by SIGTERM after step 4, which is saved; run the same command to continue"
    ):
        training.train(settings.load(str(config), changes), run)
    assert RunDir(run).checkpoints().steps() == [3, 4] and not (run / "eval" / "4").exists()
    assert [line["step"] for line in losses(run)] == [1, 2, 3, 4]
    training.train(settings.load(str(config), changes), run)
    assert sorted(folder.name for folder in (run / "eval").iterdir()) == ["4", "6"] and len(scored) == 3
    assert [line["step"] for line in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_the_log_has_each_step_once_even_where_a_kill_cut_a_line(config, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    RunDir(run).rewind_metrics(STEPS)
    assert log.read_text() == "".join(lines)
    for torn in (lines[9][:-1], lines[9][:30], '{"step": 10', "\0\0\0\0", '"step"\n', "[]\n"):
        log.write_text("".join(lines[:9]) + torn)
        RunDir(run).rewind_metrics(9)
        assert log.read_text() == "".join(lines[:9])
    RunDir(run).rewind_metrics(0)
    assert log.read_text() == "" and not (run / "tensorboard").exists()


@pytest.mark.slow
def test_a_second_process_on_the_same_folder_is_refused_and_harms_nothing(config, finished, tmp_path):
    run = tmp_path / "run"
    processes = [start("train", "--config", config, "--workdir", run) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], outputs
    refused, winner = codes.index(2), processes[codes.index(0)]
    assert outputs[refused].startswith(f"jax-it train: process {winner.pid} on ")
    assert outputs[refused].endswith(f"trains in {run}; wait for it or stop it, or name another --workdir\n")
    assert_same_run(run, finished)


def test_a_run_goes_on_on_another_mesh_and_back_with_the_same_losses(config, finished, tmp_path, capfd):
    """On 1 device up to step 45, on 8 to step 50, and on 1 again for the rest."""
    run = copy(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "60")
    layout = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    keep = ("--config.train.checkpoint_every=5 steps", "--config.train.max_to_keep=9")
    succeeds(capfd, "train", "--config", config, "--workdir", run, *layout, *keep)
    assert RunDir(run).checkpoints().steps() == [45, 50, 55, 60]
    for step in ("55", "60"):
        shutil.rmtree(run / "checkpoints" / step)
    assert "1 cpu device(s), steps 51 to 60" in finish(config, run)
    for line, other in zip(losses(run), losses(finished), strict=True):
        print(line["step"], line["loss"], line["loss"] / other["loss"] - 1)
        for name in ("step", "loss", "learning_rate", "examples", "tokens"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)
