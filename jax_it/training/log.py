"""The run's log: a line of metrics.jsonl and a TensorBoard point for each logged step, and a progress line."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from tqdm import tqdm

from jax_it.errors import UserError
from jax_it.training.tensorboard import Events
from jax_it.workdir import Workdir

FLUSH = 30  # seconds between what TensorBoard sees


class Log:
    """What has been logged before `start` stays. Raises UserError where the disk is full."""

    def __init__(self, workdir: Workdir, start: int, total: int):
        self._workdir = workdir
        with self._writing():
            self._file = workdir.metrics.open("a", encoding="utf-8")
            self._board = Events(workdir.tensorboard)
            if start:
                self._board.restart(start + 1)
        self._flushed = 0.0
        self._total = total
        self._bar = tqdm(total=total, initial=start, desc="training", unit=" steps", disable=None)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        for file in (self._board, self._file):
            with suppress(OSError):  # on a full disk: `write` has said so
                file.close()

    def advance(self) -> None:
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        with self._writing():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._board.scalars(step, values)
            if time.monotonic() > self._flushed + FLUSH:
                self._board.flush()
                self._flushed = time.monotonic()
        shown = {
            "loss": f"{values['loss']:.4f}",
            "tokens/s": f"{values['tokens_per_second']:.0f}",
            "mfu": f"{values['mfu']:.1%}",
        }
        if self._bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix(shown)

    def say(self, text: str) -> None:
        """Prints without breaking the progress bar."""
        self._bar.write(text)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to {self._workdir.path}: {error.strerror}; free space and run the same command, "
                "which goes on from the last checkpoint"
            ) from error
