"""All that a config evaluates: data.eval, and each of eval.tasks."""

from collections.abc import Callable, Mapping
from functools import cache

from jax_it import data, metrics
from jax_it.config import Config, Task
from jax_it.data import tasks
from jax_it.data.evaluation_set import EvalSet
from jax_it.data.formats import Format
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import Interrupted, UserError, first_line
from jax_it.evaluation.code_execution import CodeExecution
from jax_it.evaluation.evaluators import (
    ALL,
    TASK,
    Evaluator,
    Generate,
    HeldOut,
    MultipleChoice,
    Perplexity,
    Stopped,
)
from jax_it.metrics import Result
from jax_it.models import Params
from jax_it.run import Run
from jax_it.run_checks import check_room

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "generate": Generate, "multiple_choice": MultipleChoice, "perplexity": Perplexity, "code_execution": CodeExecution,
}  # fmt: skip


def never() -> bool:
    return False


class Suite:
    """The evaluators of a config, in their order. It is an `Evaluator` itself.

    `examples` are those that are read already, by task; others are read when their task is first evaluated.
    """

    def __init__(self, run: Run, examples: Mapping[str, EvalSet]):
        self.run, config = run, run.config
        metrics.check(config.eval.metrics)
        self._make: dict[str, Callable[[], Evaluator]] = {}
        if ALL in examples:
            held_out = HeldOut(examples[ALL], run)
            self._make[ALL] = lambda: held_out
        for number, task in enumerate(config.eval.tasks):
            self._make[task.name] = cache(_maker(number, task, run, examples.get(task.name)))
        self._raises = not config.eval.tasks

    def __call__(self, params: Params, should_stop: Callable[[], bool] = never) -> Result:
        """Return the scores of all tasks. One that fails has its reason in `errors`, and does not affect the others.

        Raises Stopped as its evaluators do, and what data.eval raises where there are no other tasks.
        """
        result = Result({}, [])
        for name, make in self._make.items():
            try:
                result = result.merge(make()(params, should_stop))
            except (Stopped, Interrupted):
                raise
            except Exception as error:
                if self._raises:
                    raise
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
                result = result.merge(Result({}, [], errors={name: {TASK: reason}}))
        return result


def _maker(number: int, task: Task, run: Run, examples: EvalSet | None) -> Callable[[], Evaluator]:
    def make() -> Evaluator:
        found = examples or _read_task(number, task, run.config, run.tokenizer, run.format)
        return EVALUATORS[task.score](task, found.examples, run)

    return make


def _read_task(number: int, task: Task, config: Config, tokenizer: Tokenizer, format: Format) -> EvalSet:
    where = f"config.eval.tasks.{number}"
    return EvalSet(tasks.read(task, where, config.data, tokenizer, format, config.eval.limit))


def within_training(run: Run) -> Suite | None:
    """Return what is evaluated within training; None where the config asks for nothing.

    Everything that the config evaluates on is read either way, so that what `jax-it eval` would not find after
    training is refused before it.
    """
    examples = read_examples(run.config, run.tokenizer, run.format)
    return Suite(run, examples) if run.config.eval.every.value or run.config.eval.at_start else None


def read_examples(config: Config, tokenizer: Tokenizer, format: Format) -> dict[str, EvalSet]:
    """Read the examples of every task, whether it is evaluated within training or after it.

    Raises UserError for what is missing, empty or malformed, and for unknown metrics.
    """
    within = bool(config.eval.every.value or config.eval.at_start)
    examples: dict[str, EvalSet] = {}
    if config.data.eval or within:
        held_out = data.build_eval(config.data, tokenizer, format, config.eval.limit)
        if held_out is not None:
            examples[ALL] = held_out
    if within and not examples and not config.eval.tasks:
        raise UserError(
            "config.eval.every needs examples: set config.data.eval, config.data.validation_size or eval.tasks"
        )
    for number, task in enumerate(config.eval.tasks):
        examples[task.name] = _read_task(number, task, config, tokenizer, format)
        if task.score == "generate":
            metrics.check(task.metrics, f"config.eval.tasks.{number}.metrics")
    return examples


def after_training(run: Run, where: str) -> Suite:
    """Return what `jax-it eval` evaluates. What cannot be read costs only its own scores.

    Raises UserError where there is nothing to evaluate; `where` is what the config is that of.
    """
    config = run.config
    check_room(run.model, config)
    held_out = data.build_eval(config.data, run.tokenizer, run.format, config.eval.limit, strict=False)
    if not config.eval.tasks and (held_out is None or not held_out.examples):
        nothing = (
            f"{where} has nothing to evaluate on: set config.data.eval, config.data.validation_size or "
            "config.eval.tasks"
        )
        raise UserError("; ".join(held_out.errors.values()) if held_out else nothing)
    return Suite(run, {} if held_out is None else {ALL: held_out})
