"""A trace of a few steps by JAX's profiler, for TensorBoard and Perfetto."""

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import jax
from etils import epath

from jax_it import files, hosts


class Profile:
    """Records `steps` steps after step `after`, where that is not 0, on the first host."""

    def __init__(self, folder: epath.Path, after: int, steps: int):
        self._folder, self._after, self._steps = folder, after, steps
        self._running, self._local = False, ExitStack()

    def __call__(self, step: int, state: Any) -> None:
        """Before the step is dispatched; `state` is what it starts from."""
        if not self._after or not hosts.is_first():
            return
        if step == self._after + 1:
            jax.block_until_ready(state)  # what came before is not part of it
            folder = self._local.enter_context(files.written_locally(self._folder))  # the profiler needs a local one
            jax.profiler.start_trace(str(folder))
            self._running = True
        elif step > self._after + self._steps and self._running:
            self._stop(state)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._running:
            self._stop(None)

    def _stop(self, state: Any) -> None:
        jax.block_until_ready(state)
        self._running = False
        jax.profiler.stop_trace()
        self._local.close()
        print(f"the profile is in {self._folder}; view it with: tensorboard --logdir {self._folder}", file=sys.stderr)
