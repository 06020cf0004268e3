"""The command `jax-it` with a fault built in: python driver.py '{"nan": [20, 99]}' train --config …

nan: [FIRST, LAST]            the loss weights of these steps' batches are not finite
huge: [FIRST, LAST, FACTOR]   the gradients of these steps are so many times larger
stall: [STEP]                 the step never ends, in a call that Python cannot interrupt
signal: [NAME, PHASE, NUMBER, DELAY]   so many seconds after the run has entered the phase for the NUMBER-th time
pause: [SECONDS]              before each step
killed_in: [MODULE, FUNCTION, NUMBER]   SIGKILL instead of its NUMBER-th call
"""

import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax_it import stopping
from jax_it.cli import main
from jax_it.training import loop, phases
from jax_it.training import step as steps

make_train_step = steps.make_train_step
enter = phases.Phases.enter


def nan(first: int, last: int) -> None:
    around(lambda number, batch: scaled(batch, float("nan")) if first <= number <= last else batch)


def huge(first: int, last: int, factor: float) -> None:
    """Weights of both signs cancel in the sum that the gradient is divided by, but not in the gradient."""
    around(lambda number, batch: tilted(batch, factor) if first <= number <= last else batch)


def stall(at: int) -> None:
    def never_ending(number: int, batch: Any) -> Any:
        if number == at:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        return batch

    around(never_ending)


def pause(seconds: float) -> None:
    def waiting(number: int, batch: Any) -> Any:
        time.sleep(seconds)
        return batch

    around(waiting)


def killed_in(module: str, name: str, number: int) -> None:
    place = importlib.import_module(module)
    function, calls = getattr(place, name), [0]

    def called(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(place, name, called)


def around(change: Any) -> None:
    """Changes the batches of a run."""

    def make(*arguments: Any) -> Any:
        step = make_train_step(*arguments)
        return lambda state, batch: step(state, change(int(state.step) + 1, batch))

    steps.make_train_step = make


def scaled(batch: Any, factor: float) -> Any:
    return batch._replace(weights_BT=batch.weights_BT * factor)


def tilted(batch: Any, factor: float) -> Any:
    weights = batch.weights_BT
    sign = 1 - 2 * ((weights > 0).cumsum(1) % 2)
    return batch._replace(weights_BT=weights * (1 + factor * sign))


def send(name: str, phase: str, number: int, delay: float) -> None:
    entered = [0]

    def fire(step: int) -> None:
        time.sleep(delay)
        print(f"{name} in {phase}, {delay:.3f} s after its entry {number}, at step {step}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, name))

    @contextmanager
    def started(*texts: str) -> Iterator[stopping.Stopping]:
        with stopping.on_signals(*texts) as stop:
            threading.Thread(target=fire, args=(0,), daemon=True).start()
            yield stop

    def watched(self: Any, to: str, step: int = 0) -> None:
        before = self.phase
        enter(self, to, step)
        if to == phase and (before != phase or phase == "evaluating"):
            entered[0] += 1
            if entered[0] == number:
                threading.Thread(target=fire, args=(step,), daemon=True).start()

    phases.Phases.enter = watched  # type: ignore[method-assign]
    if phase == "starting":
        loop.on_signals = started  # type: ignore[assignment]


if __name__ == "__main__":
    for name, values in json.loads(sys.argv[1]).items():
        faults = {"nan": nan, "huge": huge, "stall": stall, "signal": send, "pause": pause, "killed_in": killed_in}
        faults[name](*values)
    del sys.argv[1]
    main()
