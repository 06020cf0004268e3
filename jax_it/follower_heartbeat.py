"""Tell training which checkpoints the processes that score them still need, so that it does not delete those.

Each such process (`jax-it eval --follow`) keeps rewriting a file {"at": seconds since 1970, "step": the first step
that it may still read}, on a local disk or in an object store.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from etils import epath

from jax_it.files import read_json, write_atomically

INTERVAL = 30.0  # seconds between two writes
TIMEOUT = 600.0  # seconds since the last write after which a process counts as dead; clocks may differ by minutes


def waiting(folder: epath.Path, steps: Sequence[int], most: int) -> Sequence[int]:
    """Return the first `most` of these steps that a running process has yet to read; `folder` has the files."""
    needed: set[int] = set()
    for first in _first_steps(folder):
        needed |= {step for step in steps if step >= first}
    return sorted(needed)[:most]


def _first_steps(folder: epath.Path) -> Iterator[int]:
    try:
        files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    except Exception:  # it does not exist: each object store's library raises its own errors
        return
    for file in files:
        with suppress(Exception):  # gone, or damaged
            found = read_json(file)
            if abs(time.time() - found["at"]) < TIMEOUT:
                yield int(found["step"])


class Heartbeat:
    """Write this process's file. If that fails, checkpoints may be deleted before they are scored."""

    def __init__(self, file: epath.Path):
        self._file, self._step = file, 0
        self._writing = threading.Lock()
        self._over = threading.Event()

    def move(self, step: int) -> None:
        """Say that only this step and later ones are still needed."""
        if step != self._step:
            self._step = step
            self.write()

    def write(self) -> None:
        with self._writing, suppress(Exception):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, {"at": time.time(), "step": self._step})

    def beat(self) -> None:
        while not self._over.wait(INTERVAL):
            self.write()

    def end(self) -> None:
        self._over.set()
        with self._writing, suppress(Exception):
            self._file.unlink()


@contextmanager
def heartbeat(file: epath.Path) -> Iterator[Heartbeat]:
    """Keep the file up to date within the block, even while the process is busy; it starts from step 0."""
    found = Heartbeat(file)
    found.write()
    threading.Thread(target=found.beat, daemon=True, name="heartbeat").start()
    try:
        yield found
    finally:
        found.end()
