"""SIGTERM and SIGKILL at moments drawn by chance: in the end there is the run that was never stopped, bit for bit."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from jax_it.config import Mesh
from jax_it.run import open_run
from jax_it.run_dir import RunDir
from jax_it.sharding import make_mesh
from tests.tiny_run import STEPS, losses, start, write_recipe

# How often each phase is entered in a run, and about how long it lasts each time, in seconds.
PHASES = {
    "starting": (1, 4.0),
    "compiling": (1, 1.0),
    "stepping": (STEPS, 0.01),
    "waiting": (STEPS, 0.01),
    "saving": (5, 0.2),
    "evaluating": (30, 0.05),
}
EVALUATED = ("--config.eval.every=20 steps", "--config.eval.at_start=True", "--config.eval.max_new_tokens=4")


def train(folder, kind, run, **faults):
    """(exit code, output) of the command, with evaluation in the run."""
    config = f"{folder / 'config.py'}:{kind}"
    process = start("train", "--config", config, "--workdir", run, *EVALUATED, **faults)
    output = process.communicate()[0]
    return process.returncode, output


@pytest.fixture(scope="module", params=["t5", pytest.param("causal", marks=pytest.mark.faults)])
def undisturbed(request, tmp_path_factory):
    """The kind of model, the folder of its config, and a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp(request.param)
    write_recipe(folder)
    code, output = train(folder, request.param, folder / "run")
    assert code == 0, output
    return request.param, folder, folder / "run"


def everything(run):
    """All that a run leaves and that no clock has measured."""
    params = dataclasses.replace(open_run(RunDir(run)), mesh=make_mesh(Mesh(data=1), jax.devices()[:1])).load_params(
        STEPS
    )
    scores = {str(file.relative_to(run)): file.read_text() for file in sorted((run / "eval").rglob("*.json*"))}
    leftovers = [file.name for file in run.rglob("*") if "tmp" in file.name or file.name.endswith(".part")]
    return losses(run), scores, RunDir(run).checkpoints().steps()[-1], leftovers, jax.tree.map(np.asarray, params)


def assert_same(run, reference):
    *found, params = everything(run)
    *expected, weights = everything(reference)
    assert found == expected and len(expected[1]) == 8  # metrics and predictions of the start and of three steps
    assert jax.tree.all(jax.tree.map(np.array_equal, params, weights))


def stop_and_go_on(undisturbed, tmp_path, seed, number):
    """Stops runs at so many moments, each run again and again until it is done."""
    kind, folder, reference = undisturbed
    chance = random.Random(f"{kind} {seed}")
    stopped, run = 0, tmp_path / "0"
    phases = []
    while stopped < number:
        if not phases:
            phases = chance.sample(list(PHASES), len(PHASES))
        phase = phases.pop()
        times, seconds = PHASES[phase]
        moment = [chance.choice(["SIGTERM", "SIGKILL"]), phase, chance.randint(1, times), chance.uniform(0, seconds)]
        print(f"{run.name}: {moment}", flush=True)
        code, output = train(folder, kind, run, signal=moment)
        print("\n".join(line for line in output.splitlines() if "SIG" in line), flush=True)
        if f"{moment[0]} in {phase}" in output:
            stopped += 1
            if moment[0] == "SIGKILL" or code in (0, -15):
                # After its end a run stops as any process does.
                assert code in (0, -9) or len(losses(run)) == STEPS, output
            else:
                last = output.splitlines()[-1]
                assert code == 75 and last.startswith("jax-it train: stopped by SIGTERM "), output
                assert "; run the same command to continue from " in last
        if code == 0:
            assert_same(run, reference)
            run = tmp_path / str(int(run.name) + 1)
    code, output = train(folder, kind, run)
    assert code == 0, output
    assert_same(run, reference)
    lost = json.loads((run / "goodput.json").read_text())["seconds"]["lost"]
    assert lost > 0 or run.name != "0"


def test_a_run_stopped_at_a_few_moments_is_the_run_that_was_not(undisturbed, tmp_path):
    stop_and_go_on(undisturbed, tmp_path, 0, 3)


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1, 2])
def test_runs_stopped_at_many_moments_are_the_run_that_was_not(undisturbed, tmp_path, seed):
    stop_and_go_on(undisturbed, tmp_path, seed, 15)
