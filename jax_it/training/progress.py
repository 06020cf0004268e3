"""What is seen of each step: read once the next one is under way, so that the device never waits for it."""

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
    """Logs steps and looks whether they were skipped, one step behind the loop until `settle`."""

    def __init__(self, log: Log, skips: Skips, throughput: Throughput, phases: Phases):
        self._log, self._skips, self._throughput, self._phases = log, skips, throughput, phases
        self._last: tuple[int, Mapping[str, jax.Array], bool] | None = None

    def add(self, step: int, measured: Mapping[str, jax.Array], logged: bool) -> None:
        """The metrics of a step, which may not have been computed yet, and whether it is to be logged."""
        self._last = step, measured, logged
        self._log.advance()

    def settle(self) -> None:
        """Waits for the step that was added last, and looks at it."""
        if self._last is None:
            return
        step, measured, logged = self._last
        self._last = None
        if logged:
            values = {name: float(value) for name, value in measured.items()}
            del values["skipped_in_a_row"]
            values |= self._throughput.report() | {"skipped": int(values["skipped"])}
            self._log.write(step, values | {"goodput": self._phases.goodput()} | memory())
        if int(measured["skipped_in_a_row"]):
            self._skips.look(step, {name: float(value) for name, value in measured.items()})


def memory() -> dict[str, float]:
    """Peaks in bytes: of this host's fullest device, where the device tells it, and of this process."""
    stats: list[Any] = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    unit = 1 if sys.platform == "darwin" else 1024
    host = {"host_memory": float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}
    return ({"device_memory": float(max(peaks))} if peaks else {}) | host
