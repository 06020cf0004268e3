"""The process that scores checkpoints as they come, alone and beside training."""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from jax_it import evaluate
from jax_it.checkpointing import Checkpoints
from jax_it.errors import Interrupted, UserError
from jax_it.evaluation import Suite
from jax_it.evaluation import follow as following
from jax_it.evaluation.evaluate import EvalOptions
from jax_it.evaluation.follow import follow
from jax_it.run import Run
from jax_it.run_dir import RunDir
from tests.faults.conftest import quiet_libraries  # noqa: F401 - damage is on purpose
from tests.tiny_run import STEPS, copy, start, write_recipe

EVERY = 5  # steps between two checkpoints of the runs beside which the follower runs
LOSS_ALONE = ("--config.eval.generate=False", f"--config.train.checkpoint_every={EVERY} steps")


def set_eval(run, **values):
    """Changes the run's own config."""
    saved = json.loads((run / "config.json").read_text())
    saved.pop("checksum", None)  # the change is meant
    saved["config"]["eval"] |= values
    (run / "config.json").write_text(json.dumps(saved))


@pytest.fixture
def run(finished, tmp_path):
    """A finished run whose checkpoints, 45 and 60, have no scores; only the loss is taken."""
    run = copy(finished, tmp_path / "run")
    set_eval(run, generate=False)
    return run


def cut(run):
    """Takes the run's end away, as if it had been stopped."""
    shutil.rmtree(run / "checkpoints" / "60")
    (run / "ended.json").unlink()


def scored(run):
    return {
        int(file.parent.name): json.loads(file.read_text())["all"]["loss"] for file in run.glob("eval/*/metrics.json")
    }


def followed(run, *arguments, **named):
    """(steps in the order in which they are scored, what could not be)"""
    steps = []
    failed = follow(run, *arguments, report=lambda step, _: steps.append(step), **named)
    return steps, failed


def test_all_checkpoints_of_a_finished_run_are_scored_once_in_their_order(run, capfd):
    assert followed(run) == ([45, 60], {})
    losses = scored(run)
    assert evaluate(run, "45")[1].metrics["all"]["loss"] == losses[45] != losses[60]
    assert followed(run) == ([], {})
    assert "2 checkpoints scored, and training has ended" in capfd.readouterr().err
    names = [f"events.out.tfevents.{step:010d}.scores" for step in (45, 60)]
    assert sorted(file.name for file in (run / "tensorboard" / "eval").iterdir()) == names
    assert not list((run / "eval" / "followers").iterdir())


def test_one_evaluator_scores_all_checkpoints(run, monkeypatch):
    made = []
    init = Suite.__init__
    monkeypatch.setattr(Suite, "__init__", lambda self, *rest: made.append(init(self, *rest)))
    assert followed(run)[0] == [45, 60] and len(made) == 1


def reading(monkeypatch, before):
    """Calls `before(step)` before a checkpoint is read."""
    load_trained = Run.load_trained

    def read(self, step, *rest):
        before(step)
        return load_trained(self, step, *rest)

    monkeypatch.setattr(Run, "load_trained", read)


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_told_and_the_next_one_scored(run, monkeypatch, capfd):
    reading(monkeypatch, lambda step: step == 45 and shutil.rmtree(run / "checkpoints" / "45"))
    assert followed(run) == ([60], {})
    assert capfd.readouterr().err.count("checkpoint 45 was deleted before it was scored; raise config.train.") == 1


def test_a_damaged_checkpoint_is_told_once_and_left_out(run, capfd, monkeypatch):
    monkeypatch.setattr(following, "TRIES", 2)
    tried = []
    reading(monkeypatch, tried.append)
    for file in (run / "checkpoints" / "45" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    steps, failed = followed(run)
    assert steps == [60] and list(failed) == [45] and tried == [45, 45, 60]
    assert capfd.readouterr().err.count(f"checkpoint {run}/checkpoints/45 cannot be read: ") == 1
    assert failed[45].endswith("; it is skipped") and list(scored(run)) == [60]


def test_a_checkpoint_that_was_damaged_is_scored_when_training_has_written_it_anew(run, monkeypatch, capfd):
    monkeypatch.setattr(following, "TRIES", 1)
    cut(run)
    whole = copy(run / "checkpoints" / "45", run.parent / "whole")
    (run / "checkpoints" / "45" / "params" / "manifest.ocdbt").write_bytes(b"")
    count = following._Watch.unreadable

    def replaced_before_it_is_counted(*arguments):
        shutil.rmtree(run / "checkpoints" / "45")
        shutil.move(whole, run / "checkpoints" / "45")
        return count(*arguments)

    monkeypatch.setattr(following._Watch, "unreadable", replaced_before_it_is_counted)
    with pytest.raises(Interrupted, match="no new checkpoint"):
        followed(run, timeout=1)
    assert list(scored(run)) == [45] and capfd.readouterr().err.count("cannot be read") == 1


def test_a_checkpoint_that_is_being_written_is_left_alone(run):
    (run / "checkpoints" / "70.orbax-checkpoint-tmp").mkdir()
    assert followed(run) == ([45, 60], {})


def test_a_run_that_has_stopped_before_its_end_is_waited_for(run, capfd):
    cut(run)
    with pytest.raises(Interrupted, match=r"no new checkpoint in .*run for 3 s; run the same command to continue"):
        followed(run, timeout=3)
    assert list(scored(run)) == [45]
    assert "1 checkpoint scored; waiting for the next checkpoint" in capfd.readouterr().err


def test_a_run_that_has_ended_early_is_not_waited_for(run):
    cut(run)
    (run / "ended.json").write_text('{"step": 45, "why": "no better loss"}')
    assert followed(run) == ([45], {})


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "ended.json is damaged, so it does not say whether training has ended; restore or remove it\n"),
        ('{"step": 60, "why": "its duration is over"}', "ended.json says that training ended at step 60, but the"),
        ('{"step": 15, "why": "no better loss"}', "ended.json says that training ended at step 15, but the"),
    ],
)
def test_an_end_that_cannot_be_is_named_once_and_not_believed(run, capfd, content, said):
    cut(run)
    (run / "ended.json").write_text(content)
    with pytest.raises(Interrupted, match="no new checkpoint"):
        followed(run, timeout=1)
    assert list(scored(run)) == [45] and capfd.readouterr().err.count(said) == 1


def test_a_run_that_ends_between_two_looks_has_its_last_checkpoint_scored(run, monkeypatch):
    """The checkpoint and the word that it is the last come after the steps were read."""
    whole, ended = copy(run / "checkpoints" / "60", run.parent / "60"), (run / "ended.json").read_text()
    cut(run)
    steps = Checkpoints.steps

    def steps_then_the_end(self):
        found = steps(self)
        if (run / "eval" / "45" / "metrics.json").is_file() and whole.is_dir():
            whole.rename(run / "checkpoints" / "60")
            (run / "ended.json").write_text(ended)
        return found

    monkeypatch.setattr(Checkpoints, "steps", steps_then_the_end)
    assert followed(run) == ([45, 60], {})


def test_a_run_that_is_not_there_yet_is_waited_for(run, capfd):
    place = run.parent / "later"

    def appear():
        time.sleep(1)
        shutil.copytree(run, run.parent / "copy")
        (run.parent / "copy").rename(place)

    thread = threading.Thread(target=appear)
    thread.start()
    assert followed(place) == ([45, 60], {})
    thread.join()
    assert f"waiting for a run in {place}" in capfd.readouterr().err


def test_a_run_that_never_comes_is_given_up(tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no run after 1 s; start one with jax-it train"):
        follow(tmp_path / "nowhere", timeout=1)
    assert not (tmp_path / "nowhere").exists()


def test_the_second_follower_is_refused_and_one_with_another_place_for_its_scores_is_not(run):
    refused, other = [], []

    def second(step, _):
        with pytest.raises(UserError) as error:
            follow(run)
        refused.append(str(error.value))
        other.append(followed(run, EvalOptions(output=str(run.parent / "scores"))))

    follow(run, report=second)
    assert refused == [f"{line} follows the run in {run} already; stop it, or name another --output" for line in whom()]
    assert other == [([45, 60], {}), ([], {})]
    assert sorted(file.name for file in (run.parent / "scores").iterdir() if file.is_dir()) == ["45", "60"]


def whom():
    return [f"process {os.getpid()} on {os.uname().nodename}"] * 2


def test_sigterm_stops_between_two_batches_and_the_step_is_scored_by_the_next_call(run, monkeypatch):
    call = Suite.__call__

    def stopped(self, params, should_stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(self, params, should_stop)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped by SIGTERM"):
        patch.setattr(Suite, "__call__", stopped)
        follow(run)
    assert scored(run) == {} and signal.getsignal(signal.SIGTERM) is before
    assert followed(run) == ([45, 60], {})


def test_sigterm_ends_the_waiting_at_once(run):
    cut(run)
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM; run the same command to continue"):
        follow(run, report=lambda step, _: threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start())
    assert time.monotonic() < begin + 20


def test_a_run_that_is_scored_while_it_trains_is_not_followed_as_well(run):
    set_eval(run, every="20 steps")
    with pytest.raises(UserError, match=r"is scored while it trains \(config.eval.every='20 steps'\); follow a run"):
        follow(run)
    assert followed(run, EvalOptions(output=str(run.parent / "scores")))[0] == [45, 60]


def test_another_run_in_the_folder_is_opened_anew(run, capfd):
    shutil.copytree(run, run.parent / "other")
    saved = json.loads((run / "config.json").read_text())
    saved.pop("checksum", None)  # the change is meant
    saved["versions"]["python"] = "another"

    def replace(step, _):
        if step == 60 and not (run.parent / "old").exists():
            run.rename(run.parent / "old")
            (run.parent / "other" / "config.json").write_text(json.dumps(saved))
            (run.parent / "other").rename(run)

    steps = []
    follow(run, report=lambda step, _: (steps.append(step), replace(step, _)))
    assert steps == [45, 60, 45, 60] and "has been replaced or changed; opening it again" in capfd.readouterr().err


def test_a_step_whose_process_was_killed_before_it_was_shown_is_shown_by_the_next_one(run):
    followed(run)
    files = sorted((run / "tensorboard" / "eval").iterdir())
    whole = files[0].stat().st_size
    files[0].unlink()
    followed(run)
    assert files[0].stat().st_size == whole


class Beside:
    """A training run in a process of its own, and what becomes of the folder meanwhile."""

    def __init__(self, folder: Path, *options: str, pause: float = 0.0):
        self.config, self.run = write_recipe(folder), folder / "run"
        self._options, self._faults = (*LOSS_ALONE, *options), {"pause": [pause]} if pause else {}
        self.versions: dict[str, set[tuple[int, int]]] = {}  # of each metrics.json: the files that it has been
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self.process = start("train", "--config", self.config, "--workdir", self.run, *self._options, **self._faults)

    def __enter__(self):
        self._watch.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._watch.join()
        if self.process.stdout and not self.process.stdout.closed:  # the test has failed
            self.process.kill()
            print(self.process.communicate()[0])

    def _look(self) -> None:
        while not self._over.wait(0.01):
            for file in self.run.glob("eval/*/metrics.json"):
                found = file.stat()
                self.versions.setdefault(file.parent.name, set()).add((found.st_ino, found.st_mtime_ns))
                json.loads(file.read_text())

    def trained(self):
        output = self.process.communicate()[0]
        assert self.process.returncode == 0, output
        return output

    def assert_all_scored_once(self, outputs):
        """Of the steps that the follower has told, none twice, and none half."""
        told = [line for output in outputs for line in output.splitlines() if line.startswith("step ")]
        assert len(set(told)) == len(told)
        assert all(len(versions) == 1 for versions in self.versions.values())
        steps = sorted(map(int, self.versions))
        assert set(RunDir(self.run).checkpoints().steps()) <= set(steps)
        for step in steps:
            assert {file.name for file in (self.run / "eval" / str(step)).iterdir()} == {
                "metrics.json",
                "predictions.jsonl",
            }
        points = sorted((self.run / "tensorboard" / "eval").iterdir())
        assert [int(file.name.split(".")[3]) for file in points] == steps
        return steps


def test_checkpoints_of_a_run_that_trains_are_all_scored_by_followers_that_are_killed(tmp_path):
    """Two are killed: before the second step's scores are whole, and before those of the next one are shown."""
    with Beside(tmp_path, "--config.train.keep_unscored=20", pause=0.2) as beside:
        outputs = []
        for moment in ("write_atomically", 4), ("write_events", 1):
            faults = {"killed_in": ["jax_it.evaluation.results", *moment]}
            follower = start("eval", "--workdir", beside.run, "--follow", **faults)
            outputs.append(follower.communicate()[0])
            assert follower.returncode == -signal.SIGKILL, outputs
        follower = start("eval", "--workdir", beside.run, "--follow", "--timeout", 60)
        outputs.append(follower.communicate()[0])
        assert follower.returncode == 0, outputs
        beside.trained()
        time.sleep(0.1)
    assert beside.assert_all_scored_once(outputs) == list(range(EVERY, STEPS + 1, EVERY))
    assert RunDir(beside.run).choose_step("best", "loss") in scored(beside.run)


@pytest.mark.slow
def test_patience_with_a_followers_scores_ends_training_early_and_the_best_checkpoint_stays(tmp_path):
    still = ("--config.train.optimizer.learning_rate=0", "--config.eval.patience=2", "--config.train.max_to_keep=1")
    with Beside(tmp_path, *still, pause=0.5) as beside:
        follower = start("eval", "--workdir", beside.run, "--follow", "--timeout", 60)
        output = follower.communicate()[0]
        assert follower.returncode == 0, output
        trained = beside.trained()
        time.sleep(0.1)
    ended = json.loads((beside.run / "ended.json").read_text())
    assert ended["step"] < STEPS and ended["step"] % EVERY == 0
    assert f"training ends at step {ended['step']} of {STEPS}: no better loss than that of step {EVERY} in" in trained
    steps = beside.assert_all_scored_once([output])
    assert steps[0] == EVERY and steps[-1] == ended["step"]
    assert {EVERY, ended["step"]} <= set(RunDir(beside.run).checkpoints().steps())
    assert RunDir(beside.run).choose_step("best", "loss") == EVERY


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_followers_and_training_that_are_killed_at_moments_drawn_by_chance(tmp_path, seed):
    chance = random.Random(seed)
    with Beside(tmp_path, "--config.train.keep_unscored=20", pause=0.3) as beside:
        outputs = []
        for number in range(6):
            follower = start("eval", "--workdir", beside.run, "--follow")
            time.sleep(chance.uniform(1, 12))
            follower.kill()
            outputs.append(follower.communicate()[0])
            if number == 2:
                beside.process.kill()
                beside.process.communicate()
                beside.process = start(
                    "train", "--config", beside.config, "--workdir", beside.run, *beside._options, **beside._faults
                )
        follower = start("eval", "--workdir", beside.run, "--follow", "--timeout", 90)
        outputs.append(follower.communicate()[0])
        assert follower.returncode == 0, outputs
        beside.trained()
        time.sleep(0.1)
    assert beside.assert_all_scored_once(outputs)[-1] == STEPS
