"""Runs many `jax-it` commands quickly: one process imports everything once and forks a child for each command."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests import xla

Kind = Literal["ran", "refused", "fault"]


@dataclass(frozen=True)
class Result:
    """What a command did."""

    arguments: tuple[str, ...]
    code: int | None  # the exit code, negative for a signal; None if it was still running at its timeout
    out: str
    err: str
    seconds: float

    @property
    def kind(self) -> Kind:
        """ran: exit code 0. refused: exit code 2 and one line on stderr. Everything else is a fault of ours."""
        if self.code == 0 and "Traceback" not in self.err:
            return "ran"
        one_line = self.err.endswith("\n") and self.err.count("\n") == 1 and len(self.err) < 2000
        return "refused" if self.code == 2 and one_line and self.err.startswith("jax-it") else "fault"

    def __str__(self) -> str:
        how = "timed out" if self.code is None else f"exit code {self.code}"
        return f"jax-it {' '.join(self.arguments)!r}: {how} after {self.seconds:.0f} s\n{self.err[-1500:]}"


class Commands:
    """A server process that runs `jax-it` commands, each in a forked child of its own."""

    def __init__(self, folder: Path):
        """`folder` keeps the compiled programs, so that a second command with the same program compiles nothing."""
        environment = os.environ | {
            # With several devices, XLA's CPU programs that come from the cache wait for each other for ever.
            "XLA_FLAGS": xla.flags(devices=1),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.commands", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def run(self, *arguments: Any, timeout: float = 60, cwd: Path | None = None, **environment: str) -> Result:
        """Runs `jax-it ARGUMENTS`; after `timeout` seconds the child is killed."""
        assert self._server.stdin is not None and self._server.stdout is not None
        words = tuple(map(str, arguments))
        request = {"arguments": words, "timeout": timeout, "cwd": cwd and str(cwd), "environment": environment}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Result(words, **json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        with self._server:  # closing its standard input ends it
            pass


def _serve(folder: Path) -> None:
    # Imported when data is read or a tokenizer is loaded; every child would do so again.
    import datasets  # noqa: F401
    import jinja2.sandbox  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import zstandard  # noqa: F401
    from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, T5Tokenizer

    import jax_it.training  # what the commands import, but for JAX's backends: those must not exist before a fork
    from jax_it import export, plan, predict, preview  # noqa: F401
    from jax_it.evaluation import evaluate, follow  # noqa: F401
    from jax_it.serving import server  # noqa: F401

    assert jax_it.training and all((AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, T5Tokenizer))
    for line in sys.stdin:
        print(json.dumps(_answer(folder, json.loads(line))), flush=True)


def _answer(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    out, err = (folder / f"{name}-{os.getpid()}" for name in ("out", "err"))
    began = time.monotonic()
    child = os.fork()
    if not child:
        _child(request, out, err)
    code: int | None = None
    while time.monotonic() < began + request["timeout"]:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = {name: file.read_bytes().decode(errors="replace") for name, file in (("out", out), ("err", err))}
    return {"code": code, **texts, "seconds": time.monotonic() - began}


def _child(request: dict[str, Any], out: Path, err: Path) -> None:
    from jax_it.cli import main

    try:
        os.setpgid(0, 0)
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["environment"])
        os.chdir(request["cwd"] or os.getcwd())
        main(request["arguments"])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
