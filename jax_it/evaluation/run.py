"""Scoring a run's checkpoints, or any model, in a process of its own."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jax_it import config as settings
from jax_it import data, files, hosts, metrics
from jax_it.config import Config
from jax_it.data import chat
from jax_it.errors import UserError
from jax_it.evaluation.evaluator import TASK, Evaluator, Scored, Stopped
from jax_it.evaluation.results import PREDICTIONS, write
from jax_it.models import Params
from jax_it.run import Run, load_run, open_run
from jax_it.run_checks import check_room
from jax_it.run_dir import SCORES, RunDir
from jax_it.stopping import Stopping, on_signals

# Of the settings of an evaluation, those that do not change its scores.
NOT_OF_SCORES = ("every", "at_start", "best", "patience", "batch_size", "run_model_code")
STOPPED = " before all was scored; run the same command to continue"


@dataclass(frozen=True)
class Request:
    """What to score on, where that is not what the run's own config says, and where the scores go."""

    config: str = ""  # FILE or FILE:ARG, whose `eval` and `data.eval` stand in place of the run's
    changes: Mapping[str, str] = field(default_factory=dict)  # {"eval.limit": "10"}
    output: str = ""  # a folder; "": in the run's
    run_model_code: bool = False
    run_metric_code: bool = False  # whether Python that the run's own config names as a metric may run

    @property
    def name(self) -> str:
        """Of the evaluation, "" for the run's own: "mmlu" for configs/mmlu.py, "mmlu-x" for configs/mmlu.py:x."""
        if not self.config:
            return ""
        file, _, arg = self.config.partition(":")
        return re.sub(r"[^\w.-]+", "_", Path(file).stem + (f"-{arg}" if arg else ""))

    @cached_property
    def given(self) -> Mapping[str, Any]:
        """The settings of the config's file, which runs once."""
        return settings.read(self.config) if self.config else {}

    def folder(self, place: RunDir, step: int) -> epath.Path:
        """Where a step's scores go: eval/STEP/ in the run's folder, eval/STEP/NAME/ or OUTPUT/STEP/."""
        if self.output:
            return files.locate(self.output) / str(step)
        return place.eval(step) / self.name if self.name else place.eval(step)

    def board(self, place: RunDir) -> epath.Path | None:
        """The folder that TensorBoard reads them from; None where they go to a folder outside the run's."""
        return None if self.output else place.tensorboard / "eval" / self.name

    def resolve(self, own: Config, changeable: tuple[str, ...] = ("eval", "data.eval")) -> Config:
        """A config with what is asked for in the place of its own. Raises UserError that names the field."""
        tree = settings.to_dict(own)
        if self.config:
            given = settings.to_dict(self.given)  # a copy, which the changes are made in
            tree["eval"] = given.get("eval", {})
            tree["data"] |= {"eval": [], "validation_size": 0}
            tree["data"] |= {
                key: value for key, value in given.get("data", {}).items() if key in ("eval", "validation_size")
            }
        for name in self.changes:
            if not any(name == part or name.startswith(f"{part}.") for part in changeable):
                raise UserError(f"--config.{name}: jax-it eval changes {' and '.join(changeable)} alone")
        # A file may not allow by itself what the command line has to ask for.
        tree["eval"] = {**tree["eval"], "run_model_code": self.run_model_code}
        return settings.resolve(settings.override(tree, self.changes), training=False)


OWN = Request()


class Scorer:
    """A run that is open, and an evaluator, to score one checkpoint after another."""

    def __init__(self, place: RunDir, request: Request):
        self.place, self.request = place, request
        own, resolved = place.open()
        self.config = request.resolve(own)
        _check_metric_code(place, request, own, self.config)
        _check_place(place, request, own, self.config)
        self.config, _ = data.pin(self.config, resolved.commits)
        self.total_steps, self.checkpoints = resolved.total_steps, place.checkpoints()
        self._run = open_run(place)
        with jax.set_mesh(self._run.mesh):
            scored = dataclasses.replace(self._run, config=self.config)
            self._evaluate = make_evaluator(scored, f"the run in {place.path}")
            self._frozen = self._run.load_frozen()

    def __call__(self, step: int, stopping: Stopping) -> Scored:
        """Scores a checkpoint and writes what it finds. Raises Unreadable, and Interrupted where it is told to stop."""
        folder = self.request.folder(self.place, step)
        check_writable(folder)
        with jax.set_mesh(self._run.mesh):
            trained = self._run.load_trained(step, self.checkpoints)
            with _holding(stopping) as go_on:
                scored = self._evaluate(self._run.model.join(trained, self._frozen), go_on)
                write(folder, scored, self.request.board(self.place), step)
        return scored


@contextmanager
def _holding(stopping: Stopping) -> Iterator[Callable[[], bool]]:
    """Within it a signal stops between two batches, or when what was found is written."""
    stopping.hold()
    try:
        yield lambda: not stopping()
    except Stopped:
        raise stopping.at_once() from None
    stopping.hold(False)


def evaluate(workdir: str | Path, checkpoint: str = "latest", request: Request = OWN) -> tuple[int, Scored]:
    """Scores a checkpoint of a run and writes eval/STEP/ in its folder. Returns (step, scores).

    It takes all devices of this process, whatever mesh the run is training on.
    """
    hosts.start()
    place = RunDir(files.locate(workdir))
    with on_signals("eval", STOPPED) as stopping:
        step = place.choose_step(checkpoint, request.resolve(place.open()[0]).eval.best)
        if request.output:
            check_unused(request.folder(place, step))
        return step, Scorer(place, request)(step, stopping)


def evaluate_model(model: str, request: Request) -> Scored:
    """Scores a model of a Transformers or PEFT folder or the hub, or a run's newest checkpoint.

    What it is scored on are the request's settings alone; the scores go to its output.
    """
    hosts.start()
    if not request.output:
        raise UserError("--model needs --output, a folder for the scores")
    folder = files.locate(request.output)
    check_unused(folder)
    own = settings.Config(model=settings.Model(path=model))
    if given := request.given.get("data"):
        tree = settings.to_dict(own)
        own = settings.resolve(tree | {"data": tree["data"] | given}, training=False)
    config = request.resolve(own, ("eval", "data", "model.chat_template"))
    with on_signals("eval", STOPPED) as stopping:
        run, params = load_run(model)
        run = dataclasses.replace(run, config=config, run_dir=None, resolved=None)
        if config.model.chat_template:
            run = dataclasses.replace(run, tokenizer=chat.with_chat_template(run.tokenizer, config.model.chat_template))
        with jax.set_mesh(run.mesh):
            evaluator = make_evaluator(run, f"the evaluation of {model}")
            with _holding(stopping) as go_on:
                scored = evaluator(params, go_on)
                write(folder, scored)
    return scored


def make_evaluator(run: Run, where: str) -> Callable[[Params, Callable[[], bool]], Scored]:
    """An evaluator of all that the config names. What cannot be read costs only its own scores."""
    unread: dict[str, str] = {}
    config = run.config
    check_room(run.model, config)
    examples = data.build_eval(config.data, run.tokenizer, run.format, config.eval.limit, unread)
    if examples is None and not config.eval.tasks:
        nothing = (
            f"{where} has nothing to evaluate on: set config.data.eval, config.data.validation_size or "
            "config.eval.tasks"
        )
        raise UserError("; ".join(unread.values()) or nothing)
    evaluator = Evaluator(run.model, run.tokenizer, examples, config, run.layout, run.mesh)

    def evaluate(params: Params, go_on: Callable[[], bool]) -> Scored:
        scored = evaluator(params, go_on)
        return scored._replace(errors={name: {TASK: why} for name, why in unread.items()} | dict(scored.errors))

    return evaluate


def check_unused(folder: epath.Path) -> None:
    """Refuses a folder that holds scores or cannot be written to, before anything is computed."""
    with hosts.first_then_others():
        for name in (SCORES, PREDICTIONS) if hosts.is_first() else ():
            if (folder / name).exists():
                raise UserError(f"{folder / name} exists already; move it away, or name another --output")
    check_writable(folder)


def check_writable(folder: epath.Path) -> None:
    """Refuses a folder for scores that cannot be made or written to; it is made when there are some."""
    with hosts.first_then_others():
        if hosts.is_first() and (reason := files.unwritable(folder)):
            raise UserError(f"cannot write to {folder}: {reason}; name another place with --output")


def _check_metric_code(place: RunDir, request: Request, own: Config, config: Config) -> None:
    """Refuses to run Python that a run's folder names: the folder may be someone else's."""
    if request.run_metric_code or request.config:  # the metrics are those of the user's own file
        return

    def code(config: Config) -> list[str]:
        lists = (config.eval.metrics, *(task.metrics for task in config.eval.tasks))
        return [name for names in lists for name in names if metrics.is_custom(name)]

    if names := [name for name in code(config) if name in code(own)]:
        raise UserError(
            f"the config of the run in {place.path} names code as a metric, {names[0]!r}, and it would run here; "
            "if you trust it, add --run-metric-code"
        )


def _check_place(place: RunDir, request: Request, own: Config, config: Config) -> None:
    """Refuses to mix scores of another evaluation with the run's own."""
    if request.name or request.output or not request.changes:
        return
    alike = (
        dataclasses.replace(config.eval, **{name: getattr(own.eval, name) for name in NOT_OF_SCORES}),
        config.data.eval,
    )
    if alike != (own.eval, own.data.eval):
        raise UserError(
            f"these are not the settings by which the run in {place.path} is scored; "
            "name a folder for scores by other ones with --output"
        )
