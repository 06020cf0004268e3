"""The metrics of each step, read while the next one runs, so that the device never waits for it."""

import math
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax

from jax_it.training.log import Log
from jax_it.training.phases import Phases
from jax_it.training.skips import Skips
from jax_it.training.throughput import Throughput


class Progress:
    """Log steps, and report those that were skipped, one step behind the loop until `settle`.

    The logged loss is the mean over the target tokens of all steps since the last one that was logged, without those
    that were skipped. `sums` are those of the checkpoint's position from which the run continues.
    """

    def __init__(
        self, log: Log, skips: Skips, throughput: Throughput, phases: Phases, sums: tuple[float, float] = (0.0, 0.0)
    ):
        self._log, self._skips, self._throughput, self._phases = log, skips, throughput, phases
        self._last: tuple[int, Mapping[str, jax.Array], bool] | None = None
        # Sums since the last logged step, in float64: of the loss over target tokens, and of their weights.
        self._loss, self._weight = sums

    def position(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of steps that are not logged yet, so that a resumed run logs the same."""
        return {"loss": [self._loss, self._weight], "throughput": self._throughput.position()}

    def add(self, step: int, measured: Mapping[str, jax.Array], logged: bool) -> None:
        """Take the metrics of a step, which may not have been computed yet, to be logged or not."""
        self._last = step, measured, logged
        self._log.advance()

    def settle(self) -> None:
        """Wait for the step that was added last, and log it."""
        if self._last is None:
            return
        step, measured, logged = self._last
        self._last = None
        values = {name: float(value) for name, value in jax.device_get(measured).items()}
        loss, weight, in_a_row = (values.pop(name) for name in ("loss", "weight", "skipped_in_a_row"))
        if not in_a_row:
            self._loss += loss * weight
            self._weight += weight
        if logged:
            mean = self._loss / self._weight if self._weight else math.nan
            self._loss = self._weight = 0.0
            rates = self._throughput.report() | {"skipped": int(values["skipped"])}
            self._log.write(step, {"loss": mean} | values | rates | {"goodput": self._phases.goodput()} | memory())
        if in_a_row:
            self._skips.look(step, values | {"loss": loss, "skipped_in_a_row": in_a_row})


def memory() -> dict[str, float]:
    """Return peaks in bytes: of this host's fullest device, if it reports them, and of this process."""
    stats: list[Any] = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    unit = 1 if sys.platform == "darwin" else 1024
    host = {"host_memory": float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}
    return ({"device_memory": float(max(peaks))} if peaks else {}) | host
