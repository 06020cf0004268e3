"""What a run shows beside its log: a profiler trace, and Weights & Biases."""

import gzip
import json
import sys
from types import ModuleType

import pytest

from jax_it import config as settings
from jax_it.config import resolve
from jax_it.errors import UserError
from jax_it.training import train
from tests.training.test_loop import logged, make_config


def with_train(config, **changes):
    tree = settings.to_dict(config)
    tree["train"] |= changes
    return resolve(tree)


class Wandb(ModuleType):
    """A package `wandb` that writes down what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = object()  # by which it is found
        self.started, self.lines, self.codes = [], [], []

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self, exit_code):
        self.codes.append(exit_code)


def test_a_run_goes_to_weights_and_biases_and_is_the_same_one_there_after_a_restart(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = with_train(make_config(tmp_path), wandb="tuning")
    train(config, tmp_path / "run")
    assert [step for step, values in wandb.lines] == [1, 2, 3, 4, 5, 6] and wandb.codes == [0]
    assert [values["loss"] for step, values in wandb.lines] == [line["loss"] for line in logged(tmp_path / "run")]
    train(config, tmp_path / "run")
    first, second = wandb.started
    assert first == second and first["id"] and first["resume"] == "allow" and first["project"] == "tuning"
    assert first["config"]["train"]["batch_size"] == 8 and first["name"] == "run"


def test_weights_and_biases_that_is_not_installed_is_refused_at_once_with_the_extra_that_installs_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config.train.wandb needs the package wandb: pip install 'jax-it\[wandb\]'"):
        train(with_train(make_config(tmp_path), wandb="tuning"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_weights_and_biases_refuses_is_said_in_one_line(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def init(**arguments):
        raise RuntimeError("no key\nset one")

    wandb.init = init
    with pytest.raises(UserError, match=r"^config.train.wandb: no key set one; fix that, or set WANDB_MODE=offline$"):
        train(with_train(make_config(tmp_path), wandb="tuning"), tmp_path / "run")


def test_a_profile_is_recorded_of_the_steps_that_are_asked_for(tmp_path, capfd):
    config = with_train(make_config(tmp_path), profile="2 steps", profile_steps=2)
    train(config, tmp_path / "run")
    folder = tmp_path / "run" / "profile"
    assert f"the profile is in {folder}" in capfd.readouterr().err
    (trace,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event}
    assert steps == {"3", "4"}
    assert list(folder.rglob("*.xplane.pb"))
