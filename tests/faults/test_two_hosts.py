"""SIGTERM to one of two hosts: both stop after the same step, which is saved, and go on together."""

import re
import signal

import pytest

from tests.multihost import processes
from tests.multihost.conftest import recipes
from tests.multihost.processes import FSDP_AND_TENSOR, STEPS, losses

__all__ = ["recipes"]


@pytest.mark.slow
def test_both_hosts_stop_at_the_same_batch_of_an_evaluation_and_do_it_again(recipes, tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    options = ("--config.train.checkpoint_every=100 steps", "--config.eval.every=1 steps")
    pair = processes.start(2, *processes.command(recipes["t5"], cut, FSDP_AND_TENSOR, *options))
    log = cut / "metrics.jsonl"
    processes.wait_for(lambda: log.exists() and log.read_text().endswith("\n"), pair)
    pair[1].send_signal(signal.SIGTERM)  # the evaluation of step 1 is compiled, which takes a few seconds
    steps = set()
    for end in processes.ends(pair):
        assert end.code == 75, end.text
        last = re.search(
            r"jax-it train: stopped by (?:SIGTERM|a signal to another host) after step (\d+), which is saved; .*",
            end.text,
        )
        assert last, end.text
        steps.add(int(last[1]))
    (step,) = steps
    assert losses(cut).keys() == set(range(1, step + 1)) and not (cut / "eval" / str(step)).exists()

    for run in (cut, whole):
        processes.train(2, recipes["t5"], run, FSDP_AND_TENSOR, *options)
    assert losses(cut) == losses(whole) and len(losses(cut)) == STEPS
    files = sorted(file.relative_to(whole) for file in (whole / "eval").rglob("*.json*"))
    assert len(files) == 2 * STEPS
    assert all((cut / file).read_text() == (whole / file).read_text() for file in files)
