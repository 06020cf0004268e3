"""The run's log: a line of metrics.jsonl and a TensorBoard point for each logged step, and a progress line."""

import json
import sys
from types import TracebackType

import tensorboardX
from tqdm import tqdm

from jax_it.workdir import Workdir


class Log:
    def __init__(self, workdir: Workdir, start: int, total: int):
        self._file = workdir.metrics.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir.tensorboard), purge_step=start + 1 if start else None)
        self._total = total
        self._bar = tqdm(total=total, initial=start, desc="training", unit=" steps", disable=None)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def advance(self) -> None:
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
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
