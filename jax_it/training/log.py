"""The run's log: a line of metrics.jsonl and a TensorBoard point for each logged step, and a progress line."""

import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from types import TracebackType
from typing import Any

from tqdm import tqdm

from jax_it import hosts, status
from jax_it.errors import UserError
from jax_it.files import remedy, to_json, write_atomically
from jax_it.run_dir import RunDir
from jax_it.tensorboard import Events
from jax_it.training.phases import SHARES, Phases, duration

FLUSH = 30  # seconds between what TensorBoard sees


class Log:
    """Write the log from step `start` on, after what was logged before. Only the first host writes and prints.

    `board` is a run of Weights & Biases, if it is wanted. Raises UserError where the disk is full.
    """

    def __init__(self, run_dir: RunDir, start: int, total: int, board: Any = None):
        self._run_dir = run_dir
        self._first = hosts.is_first()
        self._total = total
        self._bar = tqdm(
            total=total, initial=start, desc="training", unit=" steps", disable=None if self._first else True
        )
        if not self._first:
            return
        with self._writing():
            self._file = run_dir.appending("metrics.jsonl")
            name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}"
            self._board = Events(run_dir.appending(f"tensorboard/{name}"))
            if start:
                self._board.restart(start + 1)
        self._flushed = 0.0
        self._wandb = board

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if not self._first:
            return
        for file in (self._board, self._file):
            with suppress(OSError):  # on a full disk: `write` has said so
                file.close()
        if self._wandb:
            self._wandb.finish(exit_code=1 if error else 0)

    def advance(self) -> None:
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._first:
            return
        with self._writing():
            self._file.write(to_json({"step": step, **values}) + "\n")
            self._file.flush()
            self._board.scalars(step, values)
            if time.monotonic() > self._flushed + FLUSH:
                self._board.flush()
                self._flushed = time.monotonic()
        if self._wandb:
            self._wandb.log(dict(values), step=step)
        shown = {
            "loss": f"{values['loss']:.4f}",
            "tokens/s": f"{values['tokens_per_second']:.0f}",
        }
        if "mfu" in values:
            shown["mfu"] = f"{values['mfu']:.1%}"
        if self._bar.disable:
            left = duration(values["seconds_per_step"] * (self._total - step))
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self._total}  {text}  {left} left", file=sys.stderr, flush=True)
            status.said()
        else:
            self._bar.set_postfix(shown)

    def skipped(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of skipped.jsonl."""
        if self._first:
            with self._writing(), closing(self._run_dir.appending("skipped.jsonl")) as file:
                file.write(to_json({"step": step, **values}) + "\n")

    def shares(self, phases: Phases) -> None:
        """Write down what the run's time was spent on."""
        if self._first:
            with self._writing():
                write_atomically(self._run_dir.path / SHARES, phases.position())

    def say(self, text: str) -> None:
        """Print without breaking the progress bar."""
        if self._first and text:
            self._bar.write(text)

    def warn(self, text: str) -> None:
        """Print the same way to standard error."""
        if self._first:
            self._bar.write(text, file=sys.stderr)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to {self._run_dir.path}: {error.strerror}; {remedy(error.strerror)} and run the "
                "same command to continue from the last checkpoint"
            ) from error
