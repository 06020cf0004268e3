"""SIGTERM, which announces a pre-emption: what is worth saving is saved, and the command ends with `Interrupted`."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax.experimental import multihost_utils

from jax_it.errors import Interrupted

CODE = 75  # the exit code of Interrupted, for a process that cannot come to its end in order
PATIENCE = 3.0  # seconds for an end in order, where nothing has to be saved


class _AtOnce(BaseException):
    """Ends what the main thread does. No `except Exception` on its way may take it for a fault."""


class Stopping:
    """Called once a step, and once a batch in an evaluation: whether the command stops here.

    On several hosts all must call it equally often, and all stop at the same call, whichever of them got the
    signal. Where nothing is held the signal ends the command at once, with `message` on standard error.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._received = False
        self._holding = False
        self._calls = 0
        self._over = threading.Event()

    def __call__(self) -> bool:
        self._calls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._received

    def hold(self, holding: bool = True) -> None:
        """From now on there is something to bring to an end in order, or no longer."""
        self._holding = holding
        if not holding and self._received:
            raise _AtOnce

    def receive(self) -> None:
        again, self._received = self._received, True
        if not self._holding and not again:
            raise _AtOnce

    def end(self) -> None:
        self._over.set()

    def follow(self, signals: int) -> None:
        """Ends the process where the main thread does not see the signal: it compiles, say, and is not in Python."""
        with os.fdopen(signals, "rb", buffering=0) as stream:
            while number := stream.read(1):
                if number[0] != signal.SIGTERM or self._holding or self._over.wait(PATIENCE):
                    continue
                if not self._holding:
                    print(f"\n{self._message}", file=sys.stderr, flush=True)
                    os._exit(CODE)


@contextmanager
def on_sigterm(command: str, at_once: str) -> Iterator[Stopping]:
    """Within it SIGTERM stops the command; `at_once` is said where it does so without an end in order.

    In another thread than the main one signals are the caller's affair.
    """
    stopping = Stopping(f"jax-it {command}: {at_once}")
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    c_library = ctypes.CDLL(None)
    c_library.signal.argtypes, c_library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = signal.getsignal(signal.SIGTERM)
    # jax.distributed has a handler of its own, which tells the other hosts. Python does not know it.
    theirs = c_library.signal(signal.SIGTERM, int(signal.SIG_DFL))

    def receive(number: int, frame: Any) -> None:
        stopping.receive()
        if theirs and not callable(before) and jax.process_count() > 1:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs)(number)

    signal.signal(signal.SIGTERM, receive)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to when the signal comes, by C
    threading.Thread(target=stopping.follow, args=(reading,), daemon=True, name="SIGTERM").start()
    try:
        yield stopping
    except _AtOnce:
        raise Interrupted(at_once) from None
    finally:
        stopping.end()
        signal.signal(signal.SIGTERM, before)
        c_library.signal(signal.SIGTERM, theirs)
        with suppress(ValueError):
            signal.set_wakeup_fd(wakeup)
        os.close(writing)
