"""SIGTERM in every phase, a step that hangs, gradients that are not finite: what the run says, and how it continues."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from jax_it import config as settings
from jax_it import training
from jax_it.errors import Interrupted
from jax_it.run_dir import RunDir
from jax_it.stopping import on_signals
from tests.faults.test_resume import assert_same_run, finish, stop
from tests.tiny_run import STEPS, copy, losses, start


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_a_signal_while_nothing_is_held_ends_the_command_at_once_with_its_own_code(name, code):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with pytest.raises(Interrupted, match="before the end") as stopped, on_signals("train", " before the end"):
        signal.raise_signal(getattr(signal, name))
        time.sleep(5)
    assert stopped.value.code == code and ("Ctrl-C" if name == "SIGINT" else name) in str(stopped.value)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_a_signal_that_was_ignored_before_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals("train", "") as stopping:
            signal.raise_signal(signal.SIGHUP)
            assert not stopping() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


HELD = """
import os, signal, sys, time
from jax_it.stopping import on_signals
with on_signals("train", " before the end") as stopping:
    stopping.hold()
    for _ in range(2):  # one Ctrl-C, which a wrapper has passed on as well
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.7)
    assert stopping()
    print("saving", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    hash = __import__("hashlib").pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # Python sees no signal in it
"""


def test_a_second_ctrl_c_ends_the_process_at_once():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stdout == "saving\n", done.stderr
    assert done.stderr == "\njax-it train: ended at once by a second Ctrl-C; what was saved before stays\n"
    assert time.monotonic() < begin + 30


@pytest.mark.parametrize(
    "place", ["run.load_tokenizer", "run.build_data", "training.loop.with_weights", "training.opening.prepare",
              "training.opening.check_disk", "training.loop.Log"]
)  # fmt: skip
def test_sigterm_before_the_first_step_ends_the_run_at_once_and_the_same_call_starts_it(
    config, tmp_path, monkeypatch, place
):
    def told_to_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # which the signal cuts short
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"jax_it.{place}", told_to_stop)
    with pytest.raises(Interrupted, match="run the same command to continue"):
        training.train(settings.load(str(config)), tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before
    if "Log" not in place:
        assert not (tmp_path / "run").exists()
    with RunDir(tmp_path / "run").locked():
        pass


def test_sigterm_is_the_callers_affair_in_another_thread():
    found = []

    def run():
        with on_signals("train", "stopped") as stopping:
            found.extend([signal.getsignal(signal.SIGTERM), stopping()])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_sigterm_ends_a_process_that_compiles_and_does_not_see_the_signal(config, finished, tmp_path):
    run = tmp_path / "run"
    process = start("train", "--config", config, "--workdir", run, stall=[1])
    assert f"steps 1 to {STEPS}" in process.stdout.readline()
    time.sleep(1)  # it is in the step that never ends
    begin = time.monotonic()
    output = stop(process, signal.SIGTERM)
    assert time.monotonic() < begin + 20
    assert output.splitlines()[-1].startswith("jax-it train: stopped by SIGTERM before there was a new step to save; ")


def test_a_step_that_hangs_is_noticed_and_the_run_goes_on_from_its_last_checkpoint(config, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "60")
    process = start("train", "--config", config, "--workdir", run, "--config.train.step_timeout=1", stall=[52])
    output = process.communicate()[0]
    assert process.returncode == 75, output
    assert [line["step"] for line in losses(run)][-1] == 50, "the log is one step behind"
    stacks = (run / "hang-52.txt").read_text()
    assert "in never_ending" in stacks and "in train" in stacks and "never_ending" in output
    last = output.splitlines()[-1]
    assert last.startswith("jax-it train: step 52 hangs: stepping for 1 s; ")
    assert last.endswith(
        f"is printed above and saved in {run}/hang-52.txt; run the same command to continue from the last checkpoint"
    )
    finish(config, run)
    assert_same_run(run, finished)


def test_gradients_that_are_not_finite_end_the_run_past_a_limit_and_name_the_data(config, finished, tmp_path):
    run = tmp_path / "run"
    few = "--config.train.max_skipped=3"
    process = start("train", "--config", config, "--workdir", run, few, nan=[20, STEPS])
    output = process.communicate()[0]
    assert process.returncode == 2, output
    last = output.splitlines()[-1]
    assert last.startswith("jax-it train: 4 steps in a row were skipped, up to step 23: its gradient is not finite; ")
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 21, 22, 23]
    assert all(line["loss"] is line["grad_norm"] is None and 0 < line["grad_norm_mean"] < 100 for line in lines)
    assert all(line["reason"] == "its gradient is not finite (loss nan)" for line in lines)
    for line in lines:
        records = [(source["source"], record) for source in line["examples"] for record in source["records"]]
        logged = next(other for other in losses(run) if other["step"] == line["step"])
        assert len(records) == logged["examples"] and logged["skipped"] == line["step"] - 19
        assert all(0 < record <= {"say": 36, "names": 12}[source] for source, record in records)
        numbers = ", ".join(str(record) for record in line["examples"][0]["records"])
        assert f"step {line['step']} is skipped: its gradient is not finite (loss nan); its examples: record" in output
        assert f"{numbers} of {line['examples'][0]['source']!r}" in output

    # The fault is mended: the run continues from the checkpoint before it, as if nothing had happened.
    assert RunDir(run).checkpoints().steps() == [15]
    finish(config, run)
    assert_same_run(run, finished)
    assert (run / "skipped.jsonl").read_text() == ""


def test_steps_that_are_skipped_are_the_same_after_a_restart(config, tmp_path):
    fault = {"nan": [14, 17]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--config", config, "--config.train.duration=30 steps")
    for run, signals in (whole, {}), (cut, {"signal": ["SIGTERM", "stepping", 15, 0.0]}):
        output = start("train", "--workdir", run, *options, **fault, **signals).communicate()[0]
    assert "stopped by SIGTERM after step 1" in output
    process = start("train", "--workdir", cut, *options, **fault)
    output = process.communicate()[0]
    assert process.returncode == 0 and re.search(r"steps 1[6-8] to 30", output), output
    assert losses(cut) == losses(whole) and losses(cut)[-1]["skipped"] == 4
    assert (cut / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
