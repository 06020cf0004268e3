"""A run that ends before its duration is over, since its scores get no better."""

import json
import os
import signal

import pytest

from jax_it import config as settings
from jax_it import evaluate, training
from jax_it.config import Eval
from jax_it.errors import Interrupted
from jax_it.run_dir import RunDir
from jax_it.training.hooks import Patience
from tests.tiny_run import losses, write_recipe


def write(run_dir, step, metrics):
    run_dir.eval(step).mkdir(parents=True, exist_ok=True)
    (run_dir.eval(step) / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize(
    "metric, scores, step, over",
    [
        ("loss", {}, 9, False),
        ("loss", {1: 2.0, 2: 1.0, 3: 1.5}, 9, False),
        ("loss", {1: 2.0, 2: 1.0, 3: 1.5, 4: 1.0}, 9, True),  # as good is not better
        ("loss", {1: 2.0, 2: 1.0, 3: 1.5, 4: 1.0}, 3, False),  # step 4 is to come
        ("loss", {1: 1.0, 2: 2.0, 3: 0.5, 10: 3.0}, 12, False),
        ("loss", {1: 1.0, 2: float("nan"), 3: float("nan")}, 3, True),
        ("loss", {1: float("nan"), 2: 1.0, 3: 2.0}, 3, False),
        ("loss", {1: 1.0, 2: None, 3: 2.0}, 3, False),  # which was not measured
        ("rougeL", {1: 2.0, 2: 1.0, 3: 1.5}, 9, True),
        ("ter", {1: 2.0, 2: 1.0, 3: 1.5}, 9, False),
        ("sums/rougeL", {1: 2.0, 2: 1.0, 3: 1.5}, 9, True),
    ],
)
def test_training_ends_after_so_many_evaluations_without_a_better_score(tmp_path, metric, scores, step, over):
    run_dir = RunDir(tmp_path)
    task, _, name = metric.rpartition("/")
    for number, value in scores.items():
        write(run_dir, number, {task or "all": {} if value is None else {name: value}})
    assert bool(Patience(run_dir, Eval(best=metric, patience=2)).over(step)) is over
    assert not Patience(run_dir, Eval(best=metric)).over(step)


def test_scores_that_come_late_count_from_then_on_and_a_half_written_file_does_not(tmp_path):
    run_dir = RunDir(tmp_path)
    patience = Patience(run_dir, Eval(patience=2))
    write(run_dir, 3, {"all": {"loss": 1.0}})
    run_dir.eval(4).mkdir()
    (run_dir.eval(6)).mkdir()
    (run_dir.eval(6) / "metrics.json").write_text('{"all": {"lo')
    assert not patience.over(9)
    write(run_dir, 4, {"all": {"loss": 1.0}})
    assert not patience.over(9)
    write(run_dir, 6, {"all": {"loss": 1.5}})
    assert patience.over(9) == "no better loss than that of step 3 in 2 evaluations (config.eval.patience=2)"


STILL = {  # the rate is 0, so that no score is better than the first
    "train.optimizer.learning_rate": "0", "train.log_every": "1 steps", "train.checkpoint_every": "20 steps",
    "eval.every": "8 steps", "eval.generate": "False", "eval.patience": "2",
}  # fmt: skip
END = 24  # the third evaluation


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("still"))


@pytest.fixture(scope="module")
def undisturbed(recipe):
    training.train(settings.load(str(recipe), STILL), recipe.parent / "run")
    return recipe.parent / "run"


def test_a_run_that_gets_no_better_ends_early_and_is_saved(undisturbed, recipe, capfd):
    ended = json.loads((undisturbed / "ended.json").read_text())
    assert ended["step"] == END and ended["why"].startswith("no better loss than that of step 8 in 2 evaluations")
    assert len(losses(undisturbed)) == END
    assert RunDir(undisturbed).checkpoints().steps() == [20, END]
    assert sorted(int(folder.name) for folder in (undisturbed / "eval").iterdir()) == [8, 16, END]
    points = sorted(file.name for file in (undisturbed / "tensorboard" / "eval").iterdir())
    assert points == [f"events.out.tfevents.{step:010d}.scores" for step in (8, 16, END)]
    before = (undisturbed / "metrics.jsonl").read_text()
    state = training.train(settings.load(str(recipe), STILL), undisturbed)  # has nothing to do
    assert int(state.step) == END and (undisturbed / "metrics.jsonl").read_text() == before
    assert f"training ends at step {END} of 60: no better loss than that of step 8" in capfd.readouterr().out
    assert evaluate(undisturbed)[0] == END


@pytest.mark.parametrize("at", [24, *(pytest.param(step, marks=pytest.mark.slow) for step in (11, 16, 22, 23))])
def test_a_run_that_is_stopped_and_resumed_ends_at_the_same_step(recipe, undisturbed, tmp_path, monkeypatch, at):
    run = tmp_path / "run"
    add = training.progress.Progress.add

    def stopping(self, step, *rest):
        add(self, step, *rest)
        if step == at:  # seen in the evaluation of this step, or after the next one
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped by SIGTERM after step"):
        patch.setattr(training.progress.Progress, "add", stopping)
        training.train(settings.load(str(recipe), STILL), run)
    assert not (run / "ended.json").exists()
    training.train(settings.load(str(recipe), STILL), run)
    assert losses(run) == losses(undisturbed)
    assert (run / "ended.json").read_text() == (undisturbed / "ended.json").read_text()


@pytest.mark.slow
def test_with_more_patience_the_run_goes_on_to_its_end(undisturbed, recipe, tmp_path):
    config = settings.load(str(recipe), STILL | {"eval.patience": "9", "train.duration": "60 steps"})
    assert int(training.train(config, undisturbed).step) == 60
    assert json.loads((undisturbed / "ended.json").read_text()) == {"step": 60, "why": "its duration is over"}
