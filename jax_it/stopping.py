"""Stops a command at a signal: progress is saved, and the command ends with `Interrupted`.

SIGTERM announces preemption, SIGHUP that the terminal closed, SIGINT is Ctrl-C. A second Ctrl-C ends the process at
once. A signal that is ignored when the command starts, as SIGHUP under nohup, stays ignored.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax.experimental import multihost_utils

from jax_it import hosts
from jax_it.errors import Interrupted

CODE = 75  # the exit code of Interrupted
CODES: dict[int, int] = {signal.SIGTERM: CODE, signal.SIGHUP: CODE, signal.SIGINT: 130}
GRACE_PERIOD = 3.0  # seconds for an orderly exit when nothing has to be saved
# A second SIGINT within this many seconds is the same Ctrl-C: a terminal sends it to a wrapper too, which may relay it.
SAME = 0.5


class _AtOnce(BaseException):
    """Interrupt the main thread; not an Exception, so that no `except Exception` catches it."""


class Stopping:
    """Called once per step and per evaluation batch, says whether to stop now.

    All hosts must call it equally often, and all stop at the same call, whichever of them got the signal. Unless
    `hold` was called, a signal ends the command at once, with `message` on standard error.
    """

    def __init__(self, command: str, message: str) -> None:
        self._command, self._message = command, message
        self._received = 0  # the first signal
        self._holding = False
        self._calls = 0
        self._over = threading.Event()

    def __call__(self) -> bool:
        self._calls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return bool(self._received)

    def interrupted(self, text: str) -> Interrupted:
        """Return the error that ends the command: "stopped by SIGTERM" and then `text`, such as "; nothing is lost"."""
        names = {0: "a signal to another host", signal.SIGINT: "Ctrl-C"}
        name = names.get(self._received) or signal.Signals(self._received).name
        return Interrupted(f"stopped by {name}{text}", CODES.get(self._received, CODE))

    def at_once(self) -> Interrupted:
        return self.interrupted(self._message)

    def hold(self, holding: bool = True) -> None:
        """Say whether there is something to finish before the command may end."""
        self._holding = holding
        if not holding and self._received:
            raise _AtOnce

    def receive(self, number: int) -> None:
        again, self._received = self._received, self._received or number
        if not self._holding and not again:
            raise _AtOnce

    def end(self) -> None:
        self._over.set()

    def follow(self, signals: int) -> None:
        """End the process if the main thread cannot see the signal because it is outside Python, such as compiling."""
        first = 0.0
        with os.fdopen(signals, "rb", buffering=0) as stream:
            while number := stream.read(1):
                if number[0] not in CODES or self._over.is_set():
                    continue
                now = time.monotonic()
                if number[0] == signal.SIGINT and first and now > first + SAME:
                    self._exit(Interrupted("ended at once by a second Ctrl-C; what was saved before stays", 130))
                first = first or now
                if not self._holding:
                    threading.Thread(target=self._end_soon, args=(number[0],), daemon=True).start()

    def _end_soon(self, number: int) -> None:
        if not self._over.wait(GRACE_PERIOD) and not self._holding:
            self._received = self._received or number
            self._exit(self.at_once())

    def _exit(self, error: Interrupted) -> None:
        print(f"\njax-it {self._command}: {error}", file=sys.stderr, flush=True)
        with suppress(SystemExit):
            hosts.leave(error.code, "was stopped")
        os._exit(error.code)  # no exception may reach the main thread


@contextmanager
def on_signals(command: str, at_once: str) -> Iterator[Stopping]:
    """Let a signal within the block stop the command; `at_once` is the message if it does so immediately.

    Does nothing outside the main thread: signals are up to the caller there.
    """
    stopping = Stopping(command, at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    c_library = ctypes.CDLL(None)
    c_library.signal.argtypes, c_library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = {number: signal.getsignal(number) for number in CODES}
    # jax.distributed has its own handler for SIGTERM, set from C, which notifies the other hosts.
    theirs = c_library.signal(signal.SIGTERM, int(signal.SIG_DFL))

    def receive(number: int, frame: Any) -> None:
        stopping.receive(number)
        if theirs and not callable(before[signal.SIGTERM]) and jax.process_count() > 1:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs)(int(signal.SIGTERM))

    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, receive)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # C writes to it when the signal arrives
    threading.Thread(target=stopping.follow, args=(reading,), daemon=True, name="signals").start()
    try:
        yield stopping
    except _AtOnce:
        raise stopping.at_once() from None
    finally:
        stopping.end()
        for number, handler in before.items():
            if handler is not None:  # None was set by C: Python cannot restore it
                signal.signal(number, handler)
        c_library.signal(signal.SIGTERM, theirs)
        with suppress(ValueError):
            signal.set_wakeup_fd(wakeup)
        os.close(writing)
