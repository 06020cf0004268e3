"""Runs programs that nobody has read, each in a process of its own under limits.

A program gets a new empty folder that goes with it, no standard input, no environment and so no credentials,
bounded processor time, memory, files and clock time, and no network, processes or others' files as far as the
system can enforce that (`confined` says how; `gaps` says what is left open here). What it prints goes nowhere.

This keeps a model's mistakes, and its mischief of the ordinary kind, from the machine. It keeps no program from
lying about itself: tests that run in one interpreter with what they test can be tricked by code made for that.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jax_it.errors import UserError

LAYERS = ("landlock", "seccomp", "namespace")
GAPS = {  # what a system without them leaves open
    ("seccomp",): "it could start processes, and signal yours",
    ("seccomp", "namespace"): "its use of the network is refused by Python alone",
    ("landlock",): "it could read and write the files that you can",
    ("AS",): "its memory is not limited",
}
CONFINED = Path(__file__).with_name("confined.py")


@dataclass(frozen=True)
class Limits:
    """Of one program."""

    seconds: float = 10.0  # on the clock
    cpu_seconds: int = 5  # of processor, the start of Python included
    memory: int = 1 << 30  # bytes of address space
    file: int = 1 << 24  # bytes of a file that it writes
    files: int = 64  # open at a time
    processes: int = 32  # of the user, where none can be forbidden


class Outcome(NamedTuple):
    passed: bool  # the program has run to its end
    reason: str  # why not, in one line


def run_all(
    programs: Sequence[str], limits: Limits = Limits(), done: Callable[[], object] = lambda: None
) -> list[Outcome]:
    """Return the outcome of each program, as many at a time as this process has cores. `done` is called after each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def one(program: str) -> Outcome:
        outcome = run(program, limits)
        done()
        return outcome

    with ThreadPoolExecutor(cores) as pool:
        try:
            return list(pool.map(one, programs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run(program: str, limits: Limits = Limits(), layers: Sequence[str] = LAYERS) -> Outcome:
    """Run one program to its end or to a limit. `layers` are the kernel's means that it may use.

    Raises UserError where no program can be run on this machine.
    """
    with _process(program, limits, layers) as (process, read, token):
        try:
            status = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"it ran longer than {limits.seconds:g} s")
        _, *rest = read()
    if status == 0 and token in rest:
        return Outcome(True, "")
    if status < 0:
        return Outcome(False, _by_signal(-status, limits))
    return Outcome(False, _one_line(rest[0]) if rest else f"it left Python before its end (exit code {status})")


@cache
def gaps() -> tuple[str, ...]:
    """Return what a program could do on this machine but should not, each a clause. Runs one to see."""
    there = in_force()
    return tuple(text for layers, text in GAPS.items() if there.isdisjoint(layers))


def in_force(layers: Sequence[str] = LAYERS, limits: Limits = Limits()) -> set[str]:
    """Return the limits that this system takes, by their names in `confined`, and those of `layers` that it has."""
    with _process("", limits, layers) as (process, read, _):
        process.wait(60)
        return set(json.loads(read()[0]))


@contextlib.contextmanager
def _process(
    program: str, limits: Limits, layers: Sequence[str]
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], list[str]], str]]:
    """Start the process: itself, what reads the lines of its report, and the line that says that it has run to its end.

    Files stand where pipes could be flooded. All that it has started is killed at the end.
    """
    token = secrets.token_hex(16)
    order = {
        "program": program,
        "token": token,
        "parent": os.getpid(),
        "layers": list(layers),
        "limits": {
            "CPU": limits.cpu_seconds, "AS": limits.memory, "FSIZE": limits.file, "NOFILE": limits.files,
            "NPROC": limits.processes, "CORE": 0,
        },
    }  # fmt: skip
    folder = tempfile.mkdtemp(prefix="jax_it-")
    try:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as report:
            given.write(json.dumps(order).encode())
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(CONFINED)],
                stdin=given,
                stdout=report,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_environment(),
                start_new_session=True,
            )

            def read() -> list[str]:
                report.seek(0)
                lines = report.read(1 << 16).decode(errors="replace").splitlines()
                if not lines:
                    raise UserError(
                        f"no program can be run with {sys.executable} under limits (exit code {process.returncode})"
                    )
                return lines

            try:
                yield process, read, token
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    finally:
        _remove(Path(folder))


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each takes of the memory
    return {"PATH": os.defpath, "LANG": "C.UTF-8", **threads, **kept}


def _by_signal(number: int, limits: Limits) -> str:
    if number == signal.SIGXCPU:
        return f"it used more than {limits.cpu_seconds} s of processor time"
    try:
        return f"it was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"it was ended by signal {number}"


def _one_line(text: str) -> str:
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _remove(folder: Path) -> None:
    """Return a folder whose program may have taken rights away from what is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for path, _, _ in os.walk(folder):
            with contextlib.suppress(OSError):
                os.chmod(path, 0o700)
        shutil.rmtree(folder, ignore_errors=True)
