"""Where a run's wall time goes, over restarts; the watchdog that looks at it; and memory."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from jax_it import config as settings
from jax_it.chips import chip_of
from jax_it.data.loader import Sizes
from jax_it.data.packing import Shape
from jax_it.run_dir import RunDir
from jax_it.sharding import make_mesh
from jax_it.training import phases as module
from jax_it.training import progress
from jax_it.training.phases import Phases, since_first_start
from jax_it.training.progress import Progress
from jax_it.training.state import start
from jax_it.training.step import prepare
from jax_it.training.throughput import Throughput, peak_flops


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.seconds = 1000.0

    def time(self):
        return self.seconds

    def perf_counter(self):
        return self.seconds - 900


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def spend(clock, phases, **seconds):
    for phase, each in seconds.items():
        phases.enter(phase)
        clock.seconds += each


def test_every_second_since_the_first_start_is_in_one_phase(clock):
    phases = Phases(clock.time() - 4)
    clock.seconds += 6
    spend(clock, phases, compiling=20, stepping=50, waiting=5, saving=10, evaluating=5)
    assert phases.now() == {
        "starting": 10, "compiling": 20, "stepping": 50, "waiting": 5, "saving": 10, "evaluating": 5, "lost": 0
    }  # fmt: skip
    assert phases.goodput() == 0.5
    assert phases.text() == (
        "0:01:40 since the first start: starting 10.0%, compiling 20.0%, stepping 50.0%, waiting 5.0%, saving 10.0%, "
        "evaluating 5.0%"
    )


def test_what_came_after_the_checkpoint_is_lost_and_the_rest_is_carried_on(clock, tmp_path):
    phases = Phases(clock.time())
    spend(clock, phases, stepping=30, saving=1)
    position = json.loads(json.dumps({"phases": phases.position()}))
    spend(clock, phases, stepping=12)  # steps that no checkpoint has
    clock.seconds += 3600  # nothing runs
    again = since_first_start(RunDir(tmp_path), clock.time(), position)
    spend(clock, again, stepping=18)
    seconds = again.now()
    assert (seconds["stepping"], seconds["saving"], seconds["lost"]) == (48, 1, 3612)
    assert sum(seconds.values()) == clock.seconds - 1000


def test_a_run_that_stopped_before_its_first_checkpoint_has_lost_all_since_its_start(clock, tmp_path):
    phases = since_first_start(RunDir(tmp_path), clock.time(), {})
    clock.seconds += 5
    (tmp_path / "goodput.json").write_text(json.dumps(phases.position()))
    spend(clock, phases, stepping=100)
    seconds = since_first_start(RunDir(tmp_path), clock.time(), {}).now()
    assert (seconds["starting"], seconds["stepping"], seconds["lost"]) == (5, 0, 100)
    (tmp_path / "goodput.json").write_text('{"at": ')
    assert since_first_start(RunDir(tmp_path), clock.time(), {"phases": {"at": 0}}).now()["lost"] == 0


def test_rates_are_over_the_time_of_training_alone(clock):
    phases = Phases(clock.time())
    spend(clock, phases, starting=30, evaluating=7)
    shape = Shape(2, 8, 16)
    throughput = Throughput(1000.0, phases)
    spend(clock, phases, compiling=60)
    assert not throughput.knows(shape)
    for _ in range(2):
        spend(clock, phases, waiting=1, stepping=3, evaluating=100, saving=1)
        throughput.add(Sizes(4, 20, 10, 32, 40), shape, 500.0)
        assert throughput.knows(shape)
    rates = throughput.report()
    assert (rates["seconds_per_step"], rates["tokens_per_second"], rates["data_share"]) == (5, 6, 0.2)
    assert (rates["mfu"], rates["flops_per_second"]) == (0.1, 100)
    assert (rates["mfu"], rates["examples"], rates["source_fill"], rates["target_fill"]) == (0.1, 8, 0.625, 0.25)
    spend(clock, phases, stepping=2)
    throughput.add(Sizes(4, 20, 10, 32, 40), shape, 500.0)
    assert throughput.report()["seconds_per_step"] == 2


def test_there_is_no_utilization_of_a_peak_that_nobody_has_published(clock):
    throughput = Throughput(None, Phases(clock.time()))
    clock.seconds += 1
    throughput._phases.enter("stepping")
    clock.seconds += 2
    throughput.add(Sizes(4, 20, 10, 32, 40), Shape(2, 8, 16), 500.0)
    rates = throughput.report()
    assert "mfu" not in rates and rates["flops_per_second"] == 250
    assert peak_flops(8) is None  # of CPUs


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100", None), ("NVIDIA L4", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("TPU v5 lite", 197), ("TPU v5", 459), ("cpu", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_chip_is_that_of_its_own_variant(kind, teraflops):
    chip = chip_of(kind)
    assert (chip and chip.flops) == (teraflops and teraflops * 1e12)


class Silent:
    """Stands in for the log and for what looks at skipped steps."""

    def __init__(self):
        self.lines = []

    def write(self, step, values):
        self.lines.append({"step": step, **values})

    def advance(self):
        pass

    def look(self, step, measured):
        pass


def test_the_logged_loss_is_the_mean_over_target_tokens_since_the_last_logged_step_also_over_a_restart(clock):
    steps = [(1, 2.0, 10, 0), (2, 4.0, 30, 0), (3, math.nan, 7, 1), (4, 1.0, 5, 0), (5, math.inf, 9, 1)]

    def run(steps, position=None):
        phases = Phases(clock.time(), position and position["phases"])
        throughput = Throughput(None, phases, position and position["throughput"])
        silent = Silent()
        progress = Progress(silent, silent, throughput, phases, *([position["loss"]] if position else []))
        for step, loss, weight, skipped in steps:
            spend(clock, phases, stepping=2)
            throughput.add(Sizes(4, 20, 10, 32, 40), Shape(2, 8, 16), 500.0)
            measured = {"loss": loss, "weight": weight, "skipped": skipped, "skipped_in_a_row": skipped}
            progress.add(step, measured | {"learning_rate": 0.5, "grad_norm": 1.0}, step in (4, 5))
            progress.settle()
        position = json.loads(json.dumps({"phases": phases.position(), **progress.position()}))
        return silent.lines, position

    whole, _ = run(steps)
    assert [line["step"] for line in whole] == [4, 5] and whole[0]["loss"] == (20 + 120 + 5) / 45
    assert math.isnan(whole[1]["loss"]) and whole[0]["examples"] == 16
    for cut in range(1, 5):
        before, position = run(steps[:cut])
        after, _ = run(steps[cut:], position)
        for one, other in zip(before + after, whole, strict=True):
            for name in ("loss", "examples", "tokens", "seconds_per_step", "flops_per_second"):
                assert one[name] == other[name] or math.isnan(one[name])


def test_the_learning_rate_of_a_step_is_that_which_the_optimizer_takes_after_skipped_ones(tiny):
    """The optimizer does not count what it skips; nor may the rate that is logged."""
    optimizer = settings.Optimizer(name="sgd", beta1=0.0, learning_rate=1.0, schedule="linear")
    config = settings.Config(train=settings.Train(optimizer=optimizer, max_grad_norm=0.0))
    prepared = prepare(tiny.model, config, make_mesh(settings.Mesh(), jax.devices()[:1]), {}, 10, 2, 0)
    state = start(jax.tree.map(jnp.copy, tiny.params), {}, prepared.optimizer)
    with jax.set_mesh(make_mesh(settings.Mesh(), jax.devices()[:1])):
        for number in range(5):
            broken = number in (1, 2)
            batch = tiny.packed._replace(weights_BT=tiny.packed.weights_BT * (math.nan if broken else 1.0))
            before = jax.device_get(state.params)
            state, measured = prepared.step(state, batch)
            moved = float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), before)))
            expected = 0.0 if broken else float(measured["grad_norm"]) * float(measured["learning_rate"])
            assert moved == pytest.approx(expected, rel=1e-4)
    assert float(measured["learning_rate"]) == 1.0 and int(measured["skipped"]) == 2  # the third that is taken


WATCHED = """
import sys, time, threading
from pathlib import Path
from jax_it.training.phases import Phases
from jax_it.training.watchdog import watching
from jax_it.run_dir import RunDir

phases = Phases(time.time())
with watching(phases, 0.2, RunDir(Path(sys.argv[1]))):
    for number in range(8):  # each step is within the limit, all together are not
        phases.enter("stepping", number)
        time.sleep(0.1)
    phases.enter("saving", 7)
    time.sleep(1)  # which may last longer
    phases.enter("waiting", 8)
    {last}
    threading.Event().wait()
"""


def test_a_phase_within_its_limit_is_let_be_and_one_past_it_is_ended(tmp_path):
    command = [sys.executable, "-c", WATCHED.replace("{last}", ""), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert "step 8 hangs: waiting for 0 s; " in done.stderr
    assert "threading.py" in (tmp_path / "hang-8.txt").read_text()


def test_a_watchdog_ends_with_what_it_watches(tmp_path):
    code = WATCHED.replace("    {last}\n    threading.Event().wait()\n", "time.sleep(1)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())


def test_the_log_has_the_peak_of_the_fullest_device_and_of_the_process(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak, "bytes_in_use": 1} if self.peak else None

    monkeypatch.setattr(progress.jax, "local_devices", lambda: [Device(3 << 30), Device(5 << 30)])
    found = progress.memory()
    assert found["device_memory"] == 5 << 30
    before, block = found["host_memory"], bytearray(200 << 20)
    block[::4096] = bytes(len(block[::4096]))
    assert 10 << 20 < before <= progress.memory()["host_memory"] < 1 << 40
    monkeypatch.setattr(progress.jax, "local_devices", lambda: [Device(0)])
    assert set(progress.memory()) == {"host_memory"}  # a CPU tells nothing of its memory
