"""What happens after a training step, where it is due: each hook is called as `hook(step, state, ending)`.

`ending` says why training ends at this step, "" if it continues. A hook returns it, or its own reason.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import jax
from etils import epath

from jax_it import evaluation, files, hosts
from jax_it.checkpointing import Checkpoints
from jax_it.config import Eval
from jax_it.evaluation import Suite
from jax_it.run import Run
from jax_it.run_dir import RunDir
from jax_it.stopping import Stopping
from jax_it.training.log import Log
from jax_it.training.phases import Phases
from jax_it.training.progress import Progress
from jax_it.training.state import TrainState

Hook = Callable[[int, TrainState, str], str]
SIGNAL = "a signal"  # the ending of a run that continues with the same command


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


class Checkpointing:
    """Save the state every `interval` steps and where training ends, each step once."""

    def __init__(self, checkpoints: Checkpoints, interval: int, total: int, progress: Progress, phases: Phases):
        self._checkpoints, self._interval, self._total = checkpoints, interval, total
        self._progress, self._phases = progress, phases
        self._saved = 0

    def is_due(self, step: int) -> bool:
        return step == self._total or is_due(step, self._interval)

    def __call__(self, step: int, state: TrainState, ending: str) -> str:
        if step != self._saved and (ending or self.is_due(step)):
            self._progress.settle()  # the log has all steps that a checkpoint has
            self._phases.enter("saving", step)
            position = {"phases": self._phases.position(), **self._progress.position()}
            self._checkpoints.save(step, state.params, without_params(state), position)
            self._saved = step
        return ending


def without_params(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint holds beside the trained params."""
    names = (field.name for field in dataclasses.fields(state))
    return {name: getattr(state, name) for name in names if name not in ("params", "frozen")}


class Evaluation:
    """Score the model every `interval` steps and after the last one. A signal that comes meanwhile ends training."""

    def __init__(
        self, run: Run, suite: Suite | None, interval: int, total: int, progress: Progress, log: Log,
        phases: Phases, stopping: Stopping,
    ):  # fmt: skip
        assert run.run_dir
        self._run_dir, self._model, self._suite = run.run_dir, run.model, suite
        self._at_start, self._interval, self._total = run.config.eval.at_start, interval, total
        self._progress, self._log, self._phases, self._stopping = progress, log, phases, stopping
        self._tensorboard = self._run_dir.tensorboard / "eval"
        if suite:
            scored = {step: self._run_dir.eval(step) for step in self._run_dir.scored_steps()}
            evaluation.write_missing_events(self._tensorboard, scored)

    def is_due(self, step: int) -> bool:
        if step == 0:
            return self._at_start
        return is_due(step, self._interval) or (step == self._total and self._interval > 0)

    def __call__(self, step: int, state: TrainState, ending: str) -> str:
        if ending or self._suite is None or not self.is_due(step):
            return ending

        def should_stop() -> bool:
            self._phases.enter("evaluating", step)
            return self._stopping()

        self._progress.settle()
        try:
            result = self._suite(self._model.join(state.params, state.frozen), should_stop)
        except evaluation.Stopped:
            return SIGNAL
        evaluation.write(self._run_dir.eval(step), result, self._tensorboard, step)
        examples = evaluation.examples_text(result)
        self._log.say("\n".join(filter(None, (f"evaluation at step {step}", evaluation.table(result), examples))))
        return ""


class Patience:
    """End training after `eval.patience` evaluations without a better score.

    The scores are read from the run's directory: those of its own evaluations and of `jax-it eval --follow`.
    """

    def __init__(self, run_dir: RunDir, config: Eval):
        self._run_dir, self._config = run_dir, config
        self._scores: dict[int, float] = {}  # larger is better

    def after(self, *others: Checkpointing | Evaluation, total: int) -> Hook:
        """Return a hook that asks at each step before the last, `total`, at which one of the others is due."""

        def hook(step: int, state: TrainState, ending: str) -> str:
            ask = not ending and step < total and any(other.is_due(step) for other in others)
            return self.over(step) if ask else ending

        return hook

    def over(self, step: int) -> str:
        """Return why training ends at this step, "" if it does not. All hosts must ask, and get the same answer.

        Scores of later steps, which a run that is resumed finds from before it was stopped, do not count yet.
        """
        if not self._config.patience:
            return ""
        why = hosts.from_first(lambda: self._why(step))
        return why if hosts.all_agree(bool(why)) else ""

    def _why(self, step: int) -> str:
        metric, patience = self._config.best, self._config.patience
        for number in self._run_dir.scored_steps():
            if number > step or number in self._scores:
                continue
            if (score := self._run_dir.measured(number, metric)) is not None:
                self._scores[number] = -math.inf if math.isnan(score) else score
        scores = dict(sorted(self._scores.items()))
        if not scores:
            return ""
        best = max(scores, key=lambda number: scores[number])  # the first of several
        later = sum(number > best for number in scores)
        if later < patience:
            return ""
        return f"no better {metric} than that of step {best} in {later} evaluations (config.eval.patience={patience})"


class Profile:
    """Record a trace of `steps` steps after step `after`, if that is not 0, for TensorBoard and Perfetto.

    On the first host. It is called before a step is dispatched, with the state that the step starts from.
    """

    def __init__(self, folder: epath.Path, after: int, steps: int):
        self._folder, self._after, self._steps = folder, after, steps
        self._running, self._local = False, ExitStack()

    def __call__(self, step: int, state: Any) -> None:
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
