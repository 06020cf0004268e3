"""All that a config evaluates: data.eval, and each of eval.tasks."""

from collections.abc import Callable, Mapping
from functools import cache

from jax_it import data, metrics
from jax_it.data import tasks
from jax_it.data.evaluation_set import EvalSet
from jax_it.errors import Interrupted, UserError, first_line
from jax_it.evaluation import evaluators, lm_eval_task
from jax_it.evaluation.code_execution import CodeExecution
from jax_it.evaluation.evaluators import ALL, TASK, Evaluator, Stopped
from jax_it.metrics import Result
from jax_it.models import Params
from jax_it.run import Run
from jax_it.run_checks import check_room

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "generate": evaluators.Generate, "multiple_choice": evaluators.MultipleChoice, "perplexity": evaluators.Perplexity,
    "code_execution": CodeExecution, "lm_eval": lm_eval_task.LmEvalTask,
}  # fmt: skip


class Suite:
    """The evaluators of a config, in their order. It is an `Evaluator` itself.

    `examples` are those that are read already, by task; others are read when their task is first evaluated.
    """

    def __init__(self, run: Run, examples: Mapping[str, EvalSet]):
        self.run, self._examples = run, examples
        metrics.check(run.config.eval.metrics)  # also where nothing uses them
        self._evaluators: dict[str, Callable[[], Evaluator]] = {}
        if ALL in examples:
            held_out = evaluators.HeldOut(examples[ALL], run)
            self._evaluators[ALL] = lambda: held_out
        for number, task in enumerate(run.config.eval.tasks):
            self._evaluators[task.name] = cache(lambda number=number: self._make(number))

    def _make(self, number: int) -> Evaluator:
        task = self.run.config.eval.tasks[number]
        found = self._examples[task.name] if task.name in self._examples else _read_task(number, self.run)
        return EVALUATORS[task.score](task, found.examples, self.run)

    def __call__(self, params: Params, should_stop: Callable[[], bool] = lambda: False) -> Result:
        """Return the scores of all tasks. One that fails has its reason in `errors`, and does not affect the others.

        Raises Stopped as its evaluators do, and what data.eval raises if there are no other tasks.
        """
        result = Result({}, [])
        for name, evaluator in self._evaluators.items():
            try:
                result = result.merge(evaluator()(params, should_stop))
            except (Stopped, Interrupted):
                raise
            except Exception as error:
                if not self.run.config.eval.tasks:
                    raise
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
                result = result.merge(Result({}, [], errors={name: {TASK: reason}}))
        return result


def training_suite(run: Run) -> Suite | None:
    """Return what to evaluate during training, or None if the config asks for nothing.

    All examples are read either way, so that what `jax-it eval` could not use after training is refused before it.
    """
    examples = read_examples(run)
    return Suite(run, examples) if run.config.eval.every.value or run.config.eval.at_start else None


def read_examples(run: Run) -> dict[str, EvalSet]:
    """Read the examples of every task, whether it is evaluated within training or after it.

    Raises UserError for what is missing, empty or malformed, and for unknown metrics.
    """
    config = run.config
    within = bool(config.eval.every.value or config.eval.at_start)
    examples: dict[str, EvalSet] = {}
    if config.data.eval or within:
        held_out = data.build_eval(config.data, run.tokenizer, run.format, config.eval.limit)
        if held_out is not None:
            examples[ALL] = held_out
    if within and not examples and not config.eval.tasks:
        raise UserError(
            "config.eval.every needs examples: set config.data.eval, config.data.validation_size or eval.tasks"
        )
    for number, task in enumerate(config.eval.tasks):
        examples[task.name] = _read_task(number, run)
        if task.score == "generate":
            metrics.check(task.metrics, f"config.eval.tasks.{number}.metrics")
    return examples


def _read_task(number: int, run: Run) -> EvalSet:
    config = run.config
    task, where = config.eval.tasks[number], f"config.eval.tasks.{number}"
    if task.score == "lm_eval":  # it reads them itself
        lm_eval_task.check(task)
        return EvalSet([])
    return EvalSet(tasks.read(task, where, config.data, run.tokenizer, run.format, config.eval.limit))


def eval_suite(run: Run, what: str) -> Suite:
    """Return what `jax-it eval` evaluates. A task that cannot be read costs only its own scores.

    Raises UserError if there is nothing to evaluate on; `what` names the run or model in it.
    """
    config = run.config
    check_room(run.model, config)
    held_out = data.build_eval(config.data, run.tokenizer, run.format, config.eval.limit, strict=False)
    if not config.eval.tasks and (held_out is None or not held_out.examples):
        nothing = f"{what} has nothing to evaluate on: set config.data.eval, config.data.validation_size or "
        raise UserError("; ".join(held_out.errors.values()) if held_out else f"{nothing}config.eval.tasks")
    return Suite(run, {} if held_out is None else {ALL: held_out})
