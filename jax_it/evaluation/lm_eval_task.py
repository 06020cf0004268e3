"""score="lm_eval": a task of the Language Model Evaluation Harness by its name, with the harness's own scores."""

import logging
import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from jax_it.config import Task
from jax_it.data.evaluation_set import EvalExample
from jax_it.errors import UserError
from jax_it.evaluation.evaluators import check_stop
from jax_it.metrics import Result
from jax_it.models import Params
from jax_it.run import Run

NORMAL_95 = 1.959964  # standard errors on either side of a mean


def check(task: Task) -> None:
    """Raise UserError where lm_eval is not installed, or has no such task or group of tasks."""
    if task.name not in _manager(task.data.path).all_tasks:
        if task.data.path:
            raise UserError(f"the folder {task.data.path} has no task {task.name!r}")
        raise UserError(f"lm_eval has no task {task.name!r}; `lm_eval ls tasks` lists those that it has")


@cache  # it reads thousands of files
def _manager(folder: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(f"score='lm_eval' needs {error.name}: pip install 'jax-it[harness]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=folder, include_defaults=False) if folder else TaskManager()


class LmEvalTask:
    """A task of lm_eval. Its metrics keep their names and scales ("acc,none", from 0 to 1), its tasks are groups."""

    def __init__(self, task: Task, examples: list[EvalExample], run: Run):
        check(task)
        from jax_it.harness.model import LoadedModel

        self._task, self._limit = task, run.config.eval.limit or None
        self._chat = task.chat and run.tokenizer.chat_template is not None
        self._model = LoadedModel(run, {}, "the model", task.max_prompt_length, run.config.eval.batch_size)

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> Result:
        from lm_eval import simple_evaluate

        self._model.params = params
        self._model.between_batches = lambda: check_stop(should_stop)
        drawn = random.getstate(), np.random.get_state()  # lm_eval seeds both
        try:
            found = simple_evaluate(
                self._model, tasks=[self._task.name], task_manager=_manager(self._task.data.path),
                num_fewshot=self._task.num_fewshot or None, limit=self._limit, apply_chat_template=self._chat,
                bootstrap_iters=1000,
            )  # fmt: skip
        finally:
            self._model.params = {}
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
        return _result(self._task.name, found)


def _result(task: str, found: Mapping[str, Any]) -> Result:
    metrics: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for name, values in found["results"].items():
        group = task if name == task else f"{task}/{name}"
        scores = {
            metric: float(value)
            for metric, value in values.items()
            if isinstance(value, int | float) and "," in metric and "_stderr," not in metric
        }
        metrics[group] = scores | {"n": float(values["sample_len"])}
        errors = {metric: values.get(metric.replace(",", "_stderr,")) for metric in scores}
        bounds = {
            metric: (scores[metric] - NORMAL_95 * error, scores[metric] + NORMAL_95 * error)
            for metric, error in errors.items()
            if isinstance(error, int | float)
        }
        if bounds:
            intervals[group] = bounds
    rows = [
        _row(task, name, sample)
        for name, samples in found["samples"].items()
        for sample in samples
        if sample["filter"] == samples[0]["filter"]
    ]
    return Result(metrics, rows, intervals)


def _row(task: str, name: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of predictions.jsonl."""
    row: dict[str, Any] = {"id": f"{name}/{sample['doc_id']}", "task": task}
    if name != task:
        row["group"] = name
    prompts, *rest = zip(*sample["arguments"], strict=True)
    row["prompt"], answers = prompts[0], sample["filtered_resps"]
    if not rest:  # the likelihood of a whole text
        row["log_likelihood"] = answers[0]
    elif isinstance(rest[0][0], str):  # the likelihoods of options
        row |= {"options": list(rest[0]), "log_likelihoods": [answer[0] for answer in answers]}
    else:
        row["prediction"] = answers[0] if isinstance(answers[0], list) else str(answers[0])
    return row | {"references": [str(sample["target"])]}
