"""Following a run, and the patience of one, on two processes of four devices."""

import json
import re
from pathlib import Path

import pytest

from tests.multihost import processes
from tests.multihost.processes import FSDP_AND_TENSOR, STEPS

SHORT = ("--config.eval.generate=False", "--config.train.checkpoint_every=2 steps")


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ") and "/" not in line]


@pytest.mark.slow
def test_two_hosts_score_each_checkpoint_once_together(recipes: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes.train(2, recipes["llama"], run, FSDP_AND_TENSOR, *SHORT, "--config.eval.max_new_tokens=0")
    expected = processes.ends(processes.start(1, "eval", "--workdir", run, "--follow", "--output", tmp_path / "one"))
    assert expected[0].code == 0, expected
    for file in (run / "checkpoints" / "6" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    first, second = processes.ends(processes.start(2, "eval", "--workdir", run, "--follow"))
    assert first.code == second.code == 2, (first, second)
    assert told(first.text) == ["step 8"] and told(second.text) == []
    assert re.search(r"checkpoint \S+/6 cannot be read: .*; it is skipped", first.text)
    scores = {
        folder: json.loads((folder / "8" / "metrics.json").read_text())["all"]["loss"]
        for folder in (run / "eval", tmp_path / "one")
    }
    assert scores[run / "eval"] == pytest.approx(scores[tmp_path / "one"], rel=1e-5)
    assert [folder.name for folder in (run / "eval").iterdir() if folder.name.isdigit()] == ["8"]


@pytest.mark.slow
def test_sigterm_to_one_host_ends_both_while_they_wait(recipes: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes.train(1, recipes["t5"], run, FSDP_AND_TENSOR, *SHORT)
    saved = json.loads((run / "config.json").read_text())
    del saved["checksum"]  # the change is meant
    saved["resolved"]["total_steps"] = STEPS + 1
    (run / "config.json").write_text(json.dumps(saved))
    (run / "ended.json").unlink()
    pair = processes.start(2, "eval", "--workdir", run, "--follow")
    processes.wait_for((run / "eval" / "8" / "metrics.json").is_file, pair)
    pair[1].terminate()
    done = processes.ends(pair)
    assert [end.code for end in done] == [75, 75], done


@pytest.mark.slow
def test_two_hosts_lose_their_patience_at_the_same_step(recipes: dict[str, Path], tmp_path: Path) -> None:
    still = ("--config.train.optimizer.learning_rate=0", "--config.eval.every=2 steps", "--config.eval.patience=1")
    first, _ = processes.train(2, recipes["t5"], tmp_path / "run", FSDP_AND_TENSOR, *SHORT, *still)
    assert "training ends at step 4 of 8: no better loss than that of step 2 in 1 evaluations" in first.text
    assert json.loads((tmp_path / "run" / "ended.json").read_text())["step"] == 4
