"""What a run's wall time is spent on, since its first start and over all restarts."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, get_args

from jax_it.files import read_json
from jax_it.run_dir import RunDir

SHARES = "goodput.json"  # in the run directory: what position() was at the last start or end

Phase = Literal["starting", "compiling", "stepping", "waiting", "saving", "evaluating", "lost"]


class Phases:
    """Count the seconds that the run spends in each phase.

    A checkpoint carries `position`. What came after it, until the process that continues from it started, is lost:
    steps that are taken again, and the time in which nothing ran. Goodput is the share of steps that count.
    """

    def __init__(self, began: float, position: Mapping[str, Any] | None = None):
        """`began` is the time.time() of this start; `position` is that of the checkpoint from which it continues."""
        self.seconds: dict[str, float] = dict.fromkeys(get_args(Phase), 0.0)
        self.phase: Phase = "starting"
        self.changes = 0  # by which the watchdog sees that the run is alive
        self.step = 0
        if position:
            self.seconds |= {phase: max(float(position["seconds"][phase]), 0.0) for phase in self.seconds}
            self.seconds["lost"] += max(began - float(position["at"]), 0.0)
        self._since = time.perf_counter() - max(time.time() - began, 0.0)

    def enter(self, phase: Phase, step: int = 0) -> None:
        """Count time for this phase from now on; entering it again is a sign of life."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._since
        self._since, self.phase, self.step = now, phase, step or self.step
        self.changes += 1

    def now(self) -> dict[str, float]:
        """Return the seconds of each phase up to now."""
        self.enter(self.phase)
        return dict(self.seconds)

    def goodput(self) -> float:
        seconds = self.now()
        return seconds["stepping"] / sum(seconds.values())

    def position(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"at": time.time(), "seconds": self.now()}

    def text(self) -> str:
        """Return the shares of all phases, on one line."""
        seconds = self.now()
        total = sum(seconds.values())
        shares = ", ".join(f"{phase} {part / total:.1%}" for phase, part in seconds.items() if part)
        return f"{duration(total)} since the first start: {shares}"


def since_first_start(run_dir: RunDir, began: float, position: Mapping[str, Any]) -> Phases:
    """Return the phases of a run that continues from a checkpoint, or that was started but has no checkpoint yet."""
    with suppress(KeyError, TypeError, ValueError):
        return Phases(began, position["phases"])
    try:
        found = Phases(began, read_json(run_dir.path / SHARES))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # it is the first start
        return Phases(began)
    return found if math.isfinite(sum(found.seconds.values())) else Phases(began)


def duration(seconds: float) -> str:
    """Return a time as H:MM:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
