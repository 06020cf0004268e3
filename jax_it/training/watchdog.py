"""Notice a run that hangs, print every thread's stack, and end the process, so that it is started again."""

import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jax_it import hosts
from jax_it.files import write_atomically
from jax_it.run_dir import RunDir
from jax_it.stopping import CODE
from jax_it.training.phases import Phases

LONGER = 10  # times the limit of a step, for phases that are normally slow
LONG = ("starting", "compiling", "saving", "evaluating")


@contextmanager
def watching(phases: Phases, limit: float, run_dir: RunDir) -> Iterator[None]:
    """End the process with code 75 if a phase within the block lasts over `limit` seconds, or LONGER times that."""
    over = threading.Event()
    if limit:
        threading.Thread(target=_watch, args=(phases, limit, run_dir, over), daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        over.set()


def _watch(phases: Phases, limit: float, run_dir: RunDir, over: threading.Event) -> None:
    tick = min(limit / 20, 1.0)
    seen, still = phases.changes, 0.0
    while not over.wait(tick):
        if phases.changes != seen:
            seen, still = phases.changes, 0.0
        still += tick  # counted, not measured: a process that was suspended has not hung
        if still > limit * (LONGER if phases.phase in LONG else 1):
            _end(phases, still, run_dir)


def _end(phases: Phases, still: float, run_dir: RunDir) -> None:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = file.read()
    said = f"jax-it train: step {phases.step} hangs: {phases.phase} for {still:.0f} s; "
    report = run_dir.path / f"hang-{phases.step}.txt"
    print(f"\n{stacks}", file=sys.stderr)
    if hosts.is_first():
        # In a thread of its own: it may be the disk that hangs.
        thread = threading.Thread(target=_write, args=(report, said + "\n" + stacks), daemon=True)
        thread.start()
        thread.join(30)
        said += f"the stack of every thread is printed above and saved in {report}; "
    print(f"{said}run the same command to continue from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(CODE)  # the main thread may be where no exception reaches it


def _write(file: Path, text: str) -> None:
    with suppress(OSError):
        write_atomically(file, text)
