"""A disk that is full: what was there stays, one line says what to do, and the same command then continues."""

import resource
import shutil
from contextlib import contextmanager

import jax
import pytest

from jax_it.checkpointing import Checkpoints
from jax_it.errors import UserError
from jax_it.evaluation import results
from jax_it.metrics import Result
from jax_it.run_dir import RunDir
from jax_it.training.log import Log
from tests.tiny_run import STEPS, copy, fails, losses, start, write_rows


@contextmanager
def room_for(size):
    """Within it no file can grow over so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_the_run_goes_on_from_it(config, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    log = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_text("")  # whole, it would not fit either
    quiet = "--config.train.log_every=60 steps"
    full = start("train", "--config", config, "--workdir", run, quiet, limit=12_000)  # half of a checkpoint's metadata
    output = full.communicate()[0]
    (run / "metrics.jsonl").write_bytes(log)
    assert full.returncode == 2, output
    last = output.splitlines()[-1]
    assert last.startswith(f"jax-it train: could not save a checkpoint to {run}/checkpoints: File too large; ")
    assert last.endswith("run the same command to continue from step 45")
    assert "Traceback" not in output
    assert RunDir(run).checkpoints().steps() == [45]
    done = start("train", "--config", config, "--workdir", run)
    output = done.communicate()[0]
    assert done.returncode == 0 and "steps 46 to 60" in output, output
    assert losses(run) == losses(finished)
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["45", "60"]


def test_an_old_checkpoint_is_not_deleted_before_the_new_one_is_whole(tmp_path):
    params = {"matrix": jax.random.normal(jax.random.key(0), (100, 100))}
    with (
        pytest.raises(UserError, match="File too large; fix that and run the same command to continue from step 1"),
        Checkpoints(tmp_path, max_to_keep=1) as checkpoints,
    ):
        checkpoints.save(1, params, params, {})
        checkpoints.wait()
        with room_for(20_000):
            checkpoints.save(2, params, params, {})
            checkpoints.wait()
    assert Checkpoints(tmp_path).steps() == [1]


def test_a_new_run_that_does_not_fit_leaves_no_folder(capfd, config, tmp_path):
    run = tmp_path / "run"
    with room_for(2000):
        line = fails(capfd, "train", "--config", config, "--workdir", run)
    assert f"cannot write to {run}: File too large; free space or name another --workdir" in line
    assert not run.exists()


def test_an_export_that_does_not_fit_leaves_no_folder(capfd, finished, tmp_path):
    for size in (1000, 20_000):  # too small for the weights, and for the tokenizer alone
        with room_for(size):
            line = fails(capfd, "export", "--workdir", finished, "--output", tmp_path / "out")
        assert f"cannot write {tmp_path}/out: File too large; free space and export again" in line
        assert not list(tmp_path.iterdir())


def test_predictions_that_do_not_fit_leave_those_that_were_there(tmp_path):
    scored = Result({"all": {"loss": 1.0, "n": 1.0}}, [{"id": "1", "prediction": "word " * 1000}])
    write_rows(tmp_path / "predictions.jsonl", [{"id": "old"}])
    with room_for(1000), pytest.raises(UserError, match=r"cannot write .*: File too large; free space and evaluate"):
        results.write(tmp_path, scored)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert "old" in (tmp_path / "predictions.jsonl").read_text()


def test_a_log_that_does_not_fit_says_so(tmp_path):
    with pytest.raises(UserError) as error, Log(RunDir(tmp_path), 0, 9) as log, room_for(100):
        log.write(1, {"loss": 1.0, "tokens_per_second": 2.0, "mfu": 0.5, "learning_rate": 0.125, "grad_norm": 0.25})
    line = str(error.value)
    assert f"cannot write to {tmp_path}: File too large; free space and run the same command" in line
