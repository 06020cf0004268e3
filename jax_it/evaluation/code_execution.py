"""Do the programs that a model writes pass their tests? pass@k of Chen et al. 2021."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jax_it import hosts
from jax_it.config import Task
from jax_it.data.evaluation_set import EvalExample
from jax_it.errors import UserError
from jax_it.evaluation import sandbox
from jax_it.evaluation.evaluators import Samples, check_stop, measure_groups, prediction_row, with_counts
from jax_it.evaluation.sandbox import Outcome
from jax_it.metrics import Result
from jax_it.metrics.metric import percent
from jax_it.models import Params
from jax_it.run import Run
from jax_it.status import Bar

FIELDS = ("prompt", "test", "entry_point")  # of a record: text that the model continues, tests, and what they call
CHUNK = 256  # programs between two calls of `should_stop`
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)  # Markdown's, that of a model that chats


class CodeExecution:
    """score="code_execution": the share of problems that one of k programs solves ("pass@1", "pass@10").

    Programs run in `sandbox`, and only if the user allows it. Raises UserError where that is missing, and for records
    without what a program is built from.
    """

    def __init__(self, task: Task, examples: Sequence[EvalExample], run: Run):
        if not run.config.eval.run_model_code:
            raise UserError("it runs programs that the model writes; add --run-model-code to allow that")
        self._ks = {name: _k(name, task) for name in task.metrics or ("pass@1",)}
        for example in examples:
            for field in FIELDS:
                if not isinstance(example.fields.get(field), str):
                    there = ", ".join(map(str, example.fields))
                    raise UserError(f"example {example.id}: no text in the field {field!r}; its fields: {there}")
        self._task, self._examples = task, examples
        self._samples = Samples(task, examples, run)

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> Result:
        task, several = self._task, self._task.samples > 1
        texts, unfinished = self._samples(params, should_stop)
        programs = [
            program(example.fields, text) for example, each in zip(self._examples, texts, strict=True) for text in each
        ]
        outcomes = _run(task, programs, should_stop)
        rows, solved = [], []
        for i, (example, each) in enumerate(zip(self._examples, texts, strict=True)):
            found = outcomes[i * task.samples : (i + 1) * task.samples]
            solved.append(sum(outcome.passed for outcome in found))
            passed, reasons = [outcome.passed for outcome in found], [outcome.reason for outcome in found]
            row = prediction_row(task, example, each if several else each[0])
            rows.append(
                row | {"passed": passed if several else passed[0], "reason": reasons if several else reasons[0]}
            )
        scores = {
            name: (percent, np.array([[pass_at_k(task.samples, number, k)] for number in solved]))
            for name, k in self._ks.items()
        }
        result = measure_groups(scores, task, self._examples)._replace(predictions=rows, advice=_advice())
        return with_counts(result, task, self._examples, unfinished)


def program(fields: Mapping[str, Any], text: str) -> str:
    """Join the prompt, the model's text and the tests of it. Of a text with code in Markdown, take that code.

    A whole function that the text defines replaces the prompt's, whose body is only its docstring then.
    """
    fenced = FENCE.search(text)
    code = fenced[1] if fenced else text
    return f"{fields['prompt']}{code}\n{fields['test']}\ncheck({fields['entry_point']})\n"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of k programs is right, drawn from n of which c are: 1 - C(n - c, k) / C(n, k).

    It has no bias for k up to n, unlike 1 - (1 - c / n) ** k (Chen et al. 2021, section 2.1).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"expected 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def _k(name: str, task: Task) -> int:
    match = re.fullmatch(r"pass@([1-9]\d*)", name)
    if match is None:
        raise UserError(
            f"score='code_execution' measures pass@1, pass@10 and the like, not {name!r}; "
            "change config.eval.tasks' metrics"
        )
    if int(match[1]) > task.samples:
        raise UserError(f"{name} needs samples={match[1]} or more; the task has {task.samples}")
    return int(match[1])


def _run(task: Task, programs: Sequence[str], should_stop: Callable[[], bool]) -> list[Outcome]:
    """Run programs on the first host; all get the outcomes. Raises UserError on all where no program can be run."""
    outcomes: list[Outcome] = []
    with Bar(f"testing programs of {task.name}", len(programs), "programs") as bar:
        for start in range(0, len(programs), CHUNK):
            check_stop(should_stop)
            run = partial(sandbox.run_all, programs[start : start + CHUNK], done=bar.update)
            outcomes += [Outcome(*outcome) for outcome in _from_first(run)]
    return outcomes


def _advice() -> str:
    gaps = "; ".join(_from_first(sandbox.gaps))
    return f"the model's programs ran under limits that this machine cannot fully enforce: {gaps}" if gaps else ""


def _from_first(make: Callable[[], Any]) -> Any:
    """Return what the first host makes, through JSON, or raise its UserError on all: it is one task's error alone."""

    def made() -> str:
        try:
            return json.dumps({"made": make()})
        except UserError as error:
            return json.dumps({"error": str(error)})

    found = json.loads(hosts.from_first(made))
    if "error" in found:
        raise UserError(found["error"])
    return found["made"]
