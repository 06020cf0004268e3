"""Runs on two processes of four devices: what they compute, and what becomes of the run when one of them dies."""

import json
import re
from pathlib import Path

import pytest

from tests.multihost import processes
from tests.multihost.processes import FSDP_AND_TENSOR, STEPS, TENSOR_ACROSS, losses, train

EXACT = dict(rel=1e-5, abs=0)  # sums are taken in another order


def test_a_run_on_two_hosts_survives_the_death_of_one_and_its_losses_are_those_of_one_host(
    recipes: dict[str, Path], tmp_path: Path
) -> None:
    (alone,) = train(1, recipes["t5"], tmp_path / "one", FSDP_AND_TENSOR)
    wanted = losses(tmp_path / "one")
    assert len(wanted) == STEPS and "8 cpu device(s)" in alone.text

    run = tmp_path / "two"
    # The second host dies at step 6, after the checkpoint of step 4, and while the first waits for its gradient.
    pair = processes.start(2, *processes.command(recipes["t5"], run, FSDP_AND_TENSOR))
    processes.wait_for(lambda: (run / "checkpoints" / "4").exists() and len(losses(run)) >= 5, pair)
    pair[1].kill()
    first, _ = processes.ends(pair)
    assert first.code == 75
    last = first.text.splitlines()[-1]
    assert re.search(r"host \S+ \(process 1\) was lost: .*; run the same command on all hosts to go on; ", last)
    assert len(losses(run)) < STEPS

    first, second = train(2, recipes["t5"], run, FSDP_AND_TENSOR)
    assert losses(run) == pytest.approx(wanted, **EXACT)
    assert "steps 5 to 8" in first.text
    assert "step 8/8" in first.text and "step 8/8" not in second.text  # the first host logs


@pytest.mark.slow
@pytest.mark.parametrize("model", ["t5", "llama"])
@pytest.mark.parametrize("mesh", [FSDP_AND_TENSOR, TENSOR_ACROSS], ids=["fsdp and tensor", "tensor across"])
def test_losses_are_those_of_one_host(recipes: dict[str, Path], tmp_path: Path, model: str, mesh: tuple) -> None:
    train(1, recipes[model], tmp_path / "one", mesh)
    train(2, recipes[model], tmp_path / "two", mesh)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["t5", "llama"])
def test_a_run_goes_on_with_fewer_devices_and_hosts(recipes: dict[str, Path], tmp_path: Path, model: str) -> None:
    train(1, recipes[model], tmp_path / "one", FSDP_AND_TENSOR)
    run = tmp_path / "run"
    for hosts, devices, mesh, until in (
        (2, 8, FSDP_AND_TENSOR, "checkpoints/2"),
        (1, 4, ("data=1", "fsdp=2", "tensor=2"), "checkpoints/4"),
        (1, 1, ("data=-1",), None),
    ):
        command = processes.command(recipes[model], run, mesh, "--config.train.checkpoint_every=2 steps")
        pair = processes.start(hosts, *command, devices=devices)
        if until:
            processes.wait_for(lambda until=until: (run / until).exists(), pair)
            for process in pair:
                process.kill()
            processes.ends(pair)
        else:
            assert [end.code for end in processes.ends(pair)] == [0]
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), **EXACT)


@pytest.mark.slow
def test_the_death_of_the_first_host_is_told_as_well(recipes: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    pair = processes.start(2, *processes.command(recipes["t5"], run, FSDP_AND_TENSOR))
    processes.wait_for(lambda: (run / "checkpoints" / "4").exists(), pair)
    pair[0].kill()
    _, second = processes.ends(pair)
    assert second.code == 75
    assert "(process 0) was lost" in second.text.splitlines()[-1]
    train(2, recipes["t5"], run, FSDP_AND_TENSOR)
    assert len(losses(run)) == STEPS


@pytest.mark.slow
def test_a_fault_of_the_data_ends_both_hosts_with_the_first_ones_line(recipes: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    command = processes.command(recipes["t5"], tmp_path / "run", ("data=-1",), f"--config.data.train.0.path={bad}")
    first, second = processes.ends(processes.start(2, *command))
    assert first.code == second.code == 2
    line = first.text.splitlines()[-1].removeprefix("jax-it train: ")
    assert "bad.jsonl, line 2" in line
    assert second.text.splitlines()[-1].endswith(f"(process 0): {line}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scores_and_exports_of_two_hosts_are_those_of_one(recipes: dict[str, Path], tmp_path: Path) -> None:
    run, small = tmp_path / "run", ("--config.eval.every=4 steps",)
    train(2, recipes["llama"], run, FSDP_AND_TENSOR, *small)
    in_the_loop = json.loads((run / "eval" / "8" / "metrics.json").read_text())
    predicted = (run / "eval" / "8" / "predictions.jsonl").read_text()
    for count in (1, 2):
        (run / "eval" / "8" / "metrics.json").unlink()
        done = processes.ends(processes.start(count, "eval", "--workdir", run))
        assert [end.code for end in done] == [0] * count, done
        scored = json.loads((run / "eval" / "8" / "metrics.json").read_text())
        assert list(scored["all"]) == list(in_the_loop["all"])
        for name, value in in_the_loop["all"].items():  # a number, or the bounds of an interval
            assert scored["all"][name] == pytest.approx(value, rel=1e-5)
        assert (run / "eval" / "8" / "predictions.jsonl").read_text() == predicted
        output = tmp_path / str(count) / "model"  # whose name is in its card
        output.parent.mkdir()
        done = processes.ends(processes.start(count, "export", "--workdir", run, "--output", output))
        assert [end.code for end in done] == [0] * count, done
    of_one, of_two = tmp_path / "1" / "model", tmp_path / "2" / "model"
    files = sorted(file.name for file in of_one.iterdir())
    assert files == sorted(file.name for file in of_two.iterdir())
    for file in files:
        assert (of_one / file).read_bytes() == (of_two / file).read_bytes()


@pytest.mark.slow
def test_sigterm_to_one_host_stops_both_after_the_same_step(recipes: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, recipes["t5"], tmp_path / "one", FSDP_AND_TENSOR)
    pair = processes.start(2, *processes.command(recipes["t5"], run, FSDP_AND_TENSOR))
    processes.wait_for(lambda: run.exists() and (run / "metrics.jsonl").exists() and len(losses(run)) >= 2, pair)
    pair[1].terminate()
    done = processes.ends(pair)
    assert [end.code for end in done] == [75, 75], done
    saved = sorted(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
    assert saved[-1] == max(losses(run)) < STEPS
    train(2, recipes["t5"], run, FSDP_AND_TENSOR)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), **EXACT)


CANNOT_READ = """import orbax.checkpoint as ocp
read = ocp.StandardCheckpointHandler.restore
def restore(self, folder, *rest, **named):
    if "/checkpoints/8/" in str(folder):
        raise ValueError("a part is damaged")
    return read(self, folder, *rest, **named)
ocp.StandardCheckpointHandler.restore = restore
from jax_it.cli import main
main()
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_host_cannot_read_is_passed_over_by_both(
    recipes: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(2, recipes["t5"], run, FSDP_AND_TENSOR)
    before = losses(run)
    command = processes.command(recipes["t5"], run, FSDP_AND_TENSOR)
    port = processes.free_port()
    pair = [
        processes.one(0, 2, port, *command, devices=4),
        processes.one(1, 2, port, CANNOT_READ, *command, devices=4),
    ]
    done = processes.ends(pair)
    assert [end.code for end in done] == [0, 0], done
    first = done[0]
    assert "damaged-checkpoint-8, and the run continues from step 4" in first.text
    assert (run / "damaged-checkpoint-8").is_dir() and losses(run) == before
