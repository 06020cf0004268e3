"""`jax-it eval`: scores a run's checkpoints, or any model."""

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
from jax_it.evaluation.evaluators import Stopped
from jax_it.evaluation.results import PREDICTIONS, write
from jax_it.evaluation.suite import eval_suite
from jax_it.metrics import Result
from jax_it.resolved_run import ResolvedRun
from jax_it.run import load_run, open_run
from jax_it.run_dir import SCORES, RunDir
from jax_it.stopping import Stopping, on_signals

# Settings of an evaluation that do not change its scores.
WITHOUT_EFFECT = ("every", "at_start", "best", "patience", "batch_size", "run_model_code")
STOPPED = " before everything was scored; run the same command to continue"


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate on, if not what the run's own config says, and where to write the scores."""

    config: str = ""  # FILE or FILE:ARG, whose `eval` and `data.eval` replace the run's
    changes: Mapping[str, str] = field(default_factory=dict)  # {"eval.limit": "10"}
    output: str = ""  # a folder; "": the run's
    run_model_code: bool = False
    run_metric_code: bool = False  # whether Python that the run's own config names as a metric may run

    @property
    def name(self) -> str:
        """The evaluation's name, "" for the run's own: "mmlu" for configs/mmlu.py, "mmlu-x" for configs/mmlu.py:x."""
        if not self.config:
            return ""
        file, _, arg = self.config.partition(":")
        return re.sub(r"[^\w.-]+", "_", Path(file).stem + (f"-{arg}" if arg else ""))

    @cached_property
    def file_settings(self) -> Mapping[str, Any]:
        """The settings of the config file, which runs once."""
        return settings.read(self.config) if self.config else {}

    def folder(self, run_dir: RunDir, step: int) -> epath.Path:
        """Return where to write a step's scores: eval/STEP/ in the run's folder, eval/STEP/NAME/ or OUTPUT/STEP/."""
        if self.output:
            return files.locate(self.output) / str(step)
        return run_dir.eval(step) / self.name if self.name else run_dir.eval(step)

    def tensorboard(self, run_dir: RunDir) -> epath.Path | None:
        """Return the folder of their TensorBoard events; None with an `output`."""
        return None if self.output else run_dir.tensorboard / "eval" / self.name

    def resolve(self, own: Config, changeable: tuple[str, ...] = ("eval", "data.eval")) -> Config:
        """Return a run's config with these options. Raises UserError that names the field."""
        tree = settings.to_dict(own)
        if self.config:
            given = settings.to_dict(self.file_settings)  # a copy, to be changed
            tree["eval"] = given.get("eval", {})
            tree["data"] |= {"eval": [], "validation_size": 0}
            tree["data"] |= {
                key: value for key, value in given.get("data", {}).items() if key in ("eval", "validation_size")
            }
        for name in self.changes:
            if not any(name == part or name.startswith(f"{part}.") for part in changeable):
                raise UserError(f"--config.{name}: jax-it eval can only change {' and '.join(changeable)}")
        # A file cannot allow this: the command line has to.
        tree["eval"] = {**tree["eval"], "run_model_code": self.run_model_code}
        return settings.resolve(settings.override(tree, self.changes), training=False)


OWN = EvalOptions()


def open_config(run_dir: RunDir, options: EvalOptions) -> tuple[Config, ResolvedRun]:
    """Return a run's config, changed as the options say, and its resolved values.

    Raises UserError for options that cannot be used with this run.
    """
    own, resolved = run_dir.open()
    config = options.resolve(own)
    _check_metric_code(run_dir, options, own, config)
    _check_comparable(run_dir, options, own, config)
    config, _ = data.pin(config, resolved.commits)
    return config, resolved


class CheckpointScorer:
    """An open run, and what it is evaluated on, to score one checkpoint after another."""

    def __init__(self, run_dir: RunDir, options: EvalOptions, config: Config, resolved: ResolvedRun):
        """Take what `open_config` returns of the run and the options."""
        self.run_dir, self.options = run_dir, options
        self.total_steps, self.checkpoints = resolved.total_steps, run_dir.checkpoints()
        self._run = open_run(run_dir)
        with jax.set_mesh(self._run.mesh):
            self._evaluate = eval_suite(dataclasses.replace(self._run, config=config), f"the run in {run_dir.path}")
            self._frozen = self._run.load_frozen()

    def __call__(self, step: int, stopping: Stopping) -> Result:
        """Score a checkpoint and write the results. Raises Unreadable, and Interrupted where it is stopped."""
        folder = self.options.folder(self.run_dir, step)
        check_writable(folder)
        with jax.set_mesh(self._run.mesh):
            trained = self._run.load_trained(step, self.checkpoints)
            with _stopping_between_batches(stopping) as should_stop:
                result = self._evaluate(self._run.model.join(trained, self._frozen), should_stop)
                write(folder, result, self.options.tensorboard(self.run_dir), step)
        return result


@contextmanager
def _stopping_between_batches(stopping: Stopping) -> Iterator[Callable[[], bool]]:
    """Within it a signal stops the evaluation between two batches, or once its results are written."""
    stopping.hold()
    try:
        yield stopping
    except Stopped:
        raise stopping.at_once() from None
    stopping.hold(False)


def evaluate(workdir: str | Path, checkpoint: str = "latest", options: EvalOptions = OWN) -> tuple[int, Result]:
    """Score a checkpoint of a run and write eval/STEP/ in its folder. Returns (step, scores).

    It uses all devices of this process, whatever mesh the run trains on.
    """
    hosts.start()
    run_dir = RunDir(files.locate(workdir))
    with on_signals("eval", STOPPED) as stopping:
        config, resolved = open_config(run_dir, options)
        step = run_dir.choose_step(checkpoint, config.eval.best)
        if options.output:
            check_unused(options.folder(run_dir, step))
        return step, CheckpointScorer(run_dir, options, config, resolved)(step, stopping)


def evaluate_model(path: str, options: EvalOptions) -> Result:
    """Score a model of a Transformers or PEFT folder or the hub, or a run's newest checkpoint.

    It is evaluated as the options say, and they name the folder for the results.
    """
    hosts.start()
    if not options.output:
        raise UserError("--model needs --output, a folder for the scores")
    folder = files.locate(options.output)
    check_unused(folder)
    own = settings.Config(model=settings.Model(path=path))
    if given := options.file_settings.get("data"):
        tree = settings.to_dict(own)
        own = settings.resolve(tree | {"data": tree["data"] | given}, training=False)
    config = options.resolve(own, ("eval", "data", "model.chat_template"))
    with on_signals("eval", STOPPED) as stopping:
        run, params = load_run(path)
        run = dataclasses.replace(run, config=config, run_dir=None, resolved=None)
        if config.model.chat_template:
            run = dataclasses.replace(run, tokenizer=chat.with_chat_template(run.tokenizer, config.model.chat_template))
        with jax.set_mesh(run.mesh):
            suite = eval_suite(run, f"the evaluation of {path}")
            with _stopping_between_batches(stopping) as should_stop:
                result = suite(params, should_stop)
                write(folder, result)
    return result


def check_unused(folder: epath.Path) -> None:
    """Refuse a folder that holds scores or cannot be written to, before anything is computed."""
    with hosts.first_then_others():
        for name in (SCORES, PREDICTIONS) if hosts.is_first() else ():
            if (folder / name).exists():
                raise UserError(f"{folder / name} exists already; move it away, or name another --output")
    check_writable(folder)


def check_writable(folder: epath.Path) -> None:
    """Refuse a folder for scores that cannot be made or written to; it is made when there are some."""
    with hosts.first_then_others():
        if hosts.is_first() and (reason := files.unwritable(folder)):
            raise UserError(f"cannot write to {folder}: {reason}; name another folder with --output")


def _check_metric_code(run_dir: RunDir, options: EvalOptions, own: Config, config: Config) -> None:
    """Refuse to run Python that a run's folder names: the folder may be someone else's."""
    if options.run_metric_code or options.config:  # the metrics are those of the user's own file
        return

    def code(config: Config) -> list[str]:
        lists = (config.eval.metrics, *(task.metrics for task in config.eval.tasks))
        named = [f"{name!r}, as a metric" for names in lists for name in names if metrics.is_custom(name)]
        folders = [task.data.path for task in config.eval.tasks if task.score == "lm_eval" and task.data.path]
        return named + [f"in {folder!r}, for tasks of lm_eval" for folder in folders]  # such a folder may hold Python

    if names := [name for name in code(config) if name in code(own)]:
        raise UserError(
            f"the config of the run in {run_dir.path} uses Python code, {names[0]}, which would run on "
            "this machine; if you trust it, add --run-metric-code"
        )


def _check_comparable(run_dir: RunDir, options: EvalOptions, own: Config, config: Config) -> None:
    """Refuse to mix scores computed with other settings into the run's own."""
    if options.name or options.output or not options.changes:
        return
    compared = (
        dataclasses.replace(config.eval, **{name: getattr(own.eval, name) for name in WITHOUT_EFFECT}),
        config.data.eval,
    )
    if compared != (own.eval, own.data.eval):
        raise UserError(
            f"the run in {run_dir.path} is scored with other settings, and the scores would not be comparable; "
            "name another folder for these with --output"
        )
