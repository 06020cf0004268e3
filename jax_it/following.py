"""Processes that score a run's checkpoints while it trains: what they still need is not deleted under them.

Each has a file, {"at": seconds since 1970, "step": the first step that it may still read}, which it writes anew
all the time, on a local disk as in an object store.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from etils import epath

from jax_it.files import read_json, write_atomically

BEAT = 30.0  # seconds between two writes
ALIVE = 600.0  # seconds after the last one in which a process counts as running; clocks may differ by minutes


def waiting(folder: epath.Path, steps: Sequence[int], most: int) -> Sequence[int]:
    """The first so many of these steps that a running process has yet to read. Its files lie in `folder`."""
    needed: set[int] = set()
    for first in _positions(folder):
        needed |= {step for step in steps if step >= first}
    return sorted(needed)[:most]


def _positions(folder: epath.Path) -> Iterator[int]:
    try:
        files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    except Exception:  # there is none; each object store's library has its own errors
        return
    for file in files:
        with suppress(Exception):  # gone, or damaged
            found = read_json(file)
            if abs(time.time() - found["at"]) < ALIVE:
                yield int(found["step"])


class Position:
    """This process's file. What cannot be written is left: checkpoints may then go before they are scored."""

    def __init__(self, file: epath.Path):
        self._file, self._step = file, 0
        self._writing = threading.Lock()
        self._over = threading.Event()

    def move(self, step: int) -> None:
        """From now on only this step and later ones are needed."""
        if step != self._step:
            self._step = step
            self.write()

    def write(self) -> None:
        with self._writing, suppress(Exception):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, {"at": time.time(), "step": self._step})

    def beat(self) -> None:
        while not self._over.wait(BEAT):
            self.write()

    def end(self) -> None:
        self._over.set()
        with self._writing, suppress(Exception):
            self._file.unlink()


@contextmanager
def position(file: epath.Path) -> Iterator[Position]:
    """Within it the file says that this process follows, whatever it is busy with; at first from step 0 on."""
    found = Position(file)
    found.write()
    threading.Thread(target=found.beat, daemon=True, name="follows").start()
    try:
        yield found
    finally:
        found.end()
