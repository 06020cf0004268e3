"""Shows what a long command is doing: a bar on a terminal, elsewhere a line when nothing was printed for a while."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0  # seconds without output after which a line is printed

_activities: list[Callable[[], str]] = []  # the current activities, innermost last
_said = time.monotonic()


class Bar(tqdm):
    """tqdm's bar on a terminal; elsewhere it only counts, and `lines` prints the progress."""

    def __init__(self, what: str, total: int | None = None, unit: str = "steps"):
        super().__init__(desc=what, total=total, unit=f" {unit}", disable=None, leave=False)
        self._text = lambda: f"{what}, {round(self.n)}{f' of {total}' if total else ''} {unit}"
        _activities.append(self._text)

    def update(self, n: float | None = 1) -> bool | None:
        if self.disable:
            self.n += n or 0
        return super().update(n)

    def close(self) -> None:
        if self._text in _activities:
            _activities.remove(self._text)
        super().close()


@contextmanager
def activity(text: Callable[[], str]) -> Iterator[None]:
    """Let `text` describe the activity within the block; nothing is printed while it returns ""."""
    _activities.append(text)
    try:
        yield
    finally:
        _activities.remove(text)


def said() -> None:
    """Record that a line was printed just now."""
    global _said
    _said = time.monotonic()


@contextmanager
def lines(command: str, stream: Any = None) -> Iterator[None]:
    """Print a line to standard error after every INTERVAL seconds without one, unless that is a terminal."""
    stream = stream or sys.stderr
    over = threading.Event()
    if not stream.isatty():
        said()
        threading.Thread(target=_print, args=(command, stream, over), daemon=True, name="status").start()
    try:
        yield
    finally:
        over.set()


def _print(command: str, stream: Any, over: threading.Event) -> None:
    while not over.wait(max(_said + INTERVAL - time.monotonic(), INTERVAL / 30)):
        if time.monotonic() >= _said + INTERVAL:
            said()
            if text := _activities[-1]() if _activities else "working":
                print(f"jax-it {command}: {text}", file=stream, flush=True)
