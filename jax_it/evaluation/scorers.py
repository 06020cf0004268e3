"""How the examples of a task are scored: each kind is a class with one call, `scorer(params, go_on) -> Found`."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from jax_it import metrics
from jax_it.config import Config, Task
from jax_it.data import chat
from jax_it.data.formats import Format
from jax_it.data.tasks import TaskExample
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.generation import Engine, Sampling, StopStrings, generate
from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods
from jax_it.metrics import bootstrap
from jax_it.metrics.metric import Array, Values, percent, perplexity, value
from jax_it.models import Model, Params

OVER_ALL = ""  # the group of all examples
TRUNCATED = "truncated"
UNFINISHED = "unfinished"  # texts that reached max_new_tokens before they ended
_CONTEXT = 4  # tokens of the prompt that new ones are decoded behind


class Setting(NamedTuple):
    """What a scorer works with."""

    model: Model
    tokenizer: Tokenizer
    format: Format
    config: Config
    mesh: jax.sharding.Mesh


class Found(NamedTuple):
    """What a scorer found, by group; `OVER_ALL` is that of all examples."""

    metrics: dict[str, dict[str, float]]
    predictions: list[dict[str, Any]]  # id, prompt, prediction, references, and what else tells
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType({})  # by group and metric; 95 %
    errors: Mapping[str, Mapping[str, str]] = MappingProxyType({})  # of metrics that failed
    advice: str = ""


class Scorer(Protocol):
    """Made of (task, its examples, setting), once for all params; it keeps what was compiled."""

    def __call__(self, params: Params, go_on: Callable[[], bool]) -> Found:
        """Raises Stopped where `go_on`, which is asked between batches, equally often on all hosts, says no."""


class Stopped(Exception):
    """An evaluation was left between two batches."""


def ask(go_on: Callable[[], bool]) -> None:
    if not go_on():
        raise Stopped


class Samples:
    """The texts that a model generates: `task.samples` for each example, cut at the task's stop strings."""

    def __init__(self, task: Task, examples: Sequence[TaskExample], setting: Setting):
        model, tokenizer, config = setting.model, setting.tokenizer, setting.config
        self._task, self._examples, self._tokenizer, self._causal = task, examples, tokenizer, model.kind == "causal"
        _check_room(model, examples, [task.max_new_tokens] * len(examples))
        sampling = Sampling(task.temperature, top_p=task.top_p, seed=task.seed, num_samples=task.samples)
        self._stop = StopStrings(task.stop, tokenizer.decode)
        rows = min(config.eval.batch_size, len(examples) * task.samples)
        self._engine = Engine(model, setting.mesh, task.max_new_tokens, rows, sampling, chat.ends(tokenizer))

    def __call__(self, params: Params, go_on: Callable[[], bool]) -> tuple[list[list[str]], list[int]]:
        """The texts of each example, and how many of them reached the task's max_new_tokens."""
        unfinished = [0] * len(self._examples)
        texts = [[""] * self._task.samples for _ in self._examples]
        prompts = [example.prompt_tokens for example in self._examples]
        with _progress(self._task, len(texts) * self._task.samples) as bar:
            for output in generate(self._engine, params, prompts, stop=self._stop if self._task.stop else None):
                decoded = self._decode(prompts[output.request_id], output.tokens)
                texts[output.request_id][output.sample] = self._stop.cut(decoded)
                unfinished[output.request_id] += output.finish_reason != "stop"
                bar.update()
                ask(go_on)
        return texts, unfinished

    def _decode(self, prompt: list[int], tokens: list[int]) -> str:
        """What the tokens add to the prompt: some tokenizers leave out the space that a text begins with."""
        if not self._causal:
            return self._tokenizer.decode(tokens)
        before = prompt[-_CONTEXT:]
        return self._tokenizer.decode([*before, *tokens])[len(self._tokenizer.decode(before)) :]


class Generated:
    """score="generate": metrics of generated text against references. Of several samples each text counts as one."""

    def __init__(self, task: Task, examples: Sequence[TaskExample], setting: Setting):
        metrics.check(task.metrics, f"the metrics of task {task.name}")
        self._task, self._examples = task, examples
        self._samples = Samples(task, examples, setting)

    def __call__(self, params: Params, go_on: Callable[[], bool]) -> Found:
        task, several = self._task, self._task.samples > 1
        texts, unfinished = self._samples(params, go_on)
        answers = [[_answer(text, task.answer) for text in each] for each in texts]
        flat = [answer for each in answers for answer in each]
        references = [example.references for example in self._examples for _ in range(task.samples)]
        groups = {
            group: [i * task.samples + sample for i in chosen for sample in range(task.samples)]
            for group, chosen in groups_of(self._examples).items()
        }
        measured = metrics.measure(task.metrics, flat, references, groups, resamples=0 if several else 1000)
        values = {group: found.values for group, found in measured.items()}
        rows = []
        for example, raw, answer in zip(self._examples, texts, answers, strict=True):
            row = row_of(example, raw if several else raw[0])
            rows.append(row | ({"answer": answer if several else answer[0]} if task.answer else {}))
        return Found(
            summed_up(values, task, self._examples, unfinished),
            rows,
            {group: found.intervals for group, found in measured.items() if found.intervals},
            {group: found.errors for group, found in measured.items() if found.errors},
            metrics.advice(task.metrics, references),
        )


class _Options:
    """The log-likelihoods of the examples' options."""

    def __init__(self, task: Task, examples: Sequence[TaskExample], setting: Setting):
        self._task, self._examples = task, examples
        longest = [max(len(option.tokens) for option in example.options) for example in examples]
        _check_room(setting.model, examples, longest)
        self._likelihoods = Likelihoods(setting.model, setting.mesh, setting.config.eval.batch_size)

    def __call__(self, params: Params, go_on: Callable[[], bool]) -> list[list[float]]:
        # An option may change how the prompt's last characters are tokenized: then it has a prompt of its own.
        requests: list[LikelihoodRequest] = []
        places: list[tuple[int, list[int]]] = []  # of each request: the example, and which of its options
        for i, example in enumerate(self._examples):
            by_prompt: dict[tuple[int, ...], list[int]] = {}
            for number, option in enumerate(example.options):
                by_prompt.setdefault(tuple(option.prompt), []).append(number)
            for prompt, numbers in by_prompt.items():
                requests.append(LikelihoodRequest(prompt, [example.options[number].tokens for number in numbers]))
                places.append((i, numbers))
        found = [[math.nan] * len(example.options) for example in self._examples]
        with _progress(self._task, len(requests)) as bar:
            for index, likelihoods in self._likelihoods(params, requests):
                i, numbers = places[index]
                for number, likelihood in zip(numbers, likelihoods, strict=True):
                    found[i][number] = likelihood.log_prob
                bar.update()
                ask(go_on)
        return found


class Ranked:
    """score="multiple_choice": accuracy of the option of the greatest log-likelihood, divided by its length or not."""

    def __init__(self, task: Task, examples: Sequence[TaskExample], setting: Setting):
        self._task, self._examples = task, examples
        self._log_probs = _Options(task, examples, setting)

    def __call__(self, params: Params, go_on: Callable[[], bool]) -> Found:
        rows, right = [], np.zeros((len(self._examples), 1))
        found = self._log_probs(params, go_on)
        for i, (example, log_probs) in enumerate(zip(self._examples, found, strict=True)):
            scores = [log_prob / self._length(n, example) for n, log_prob in enumerate(log_probs)]
            chosen = example.options[int(np.argmax(scores))].text
            right[i] = chosen == example.references[0]
            options = [option.text for option in example.options]
            rows.append(row_of(example, chosen) | {"options": options, "log_likelihoods": log_probs})
        values, intervals = over_groups({"accuracy": (percent, right)}, self._examples)
        return Found(summed_up(values, self._task, self._examples), rows, intervals)

    def _length(self, number: int, example: TaskExample) -> int:
        option = example.options[number]
        return {"none": 1, "tokens": len(option.tokens), "characters": len(option.text)}[self._task.normalize]


class Perplexity:
    """score="perplexity": of the references after their prompts; "loss" is its logarithm, nats a token of them all."""

    def __init__(self, task: Task, examples: Sequence[TaskExample], setting: Setting):
        self._task, self._examples = task, examples
        self._log_probs = _Options(task, examples, setting)

    def __call__(self, params: Params, go_on: Callable[[], bool]) -> Found:
        found = [log_prob for (log_prob,) in self._log_probs(params, go_on)]
        lengths = [len(example.options[0].tokens) for example in self._examples]
        nats = np.array([[-log_prob, length] for log_prob, length in zip(found, lengths, strict=True)])
        values, intervals = over_groups({"loss": (_ratio, nats), "perplexity": (_perplexity, nats)}, self._examples)
        rows = [
            row_of(example) | {"log_likelihood": log_prob, "tokens": length}
            for example, log_prob, length in zip(self._examples, found, lengths, strict=True)
        ]
        return Found(summed_up(values, self._task, self._examples), rows, intervals)


def _ratio(sums: Array, examples: int) -> Array:
    ratio: Array = sums[:, 0] / sums[:, 1]
    return ratio


def _perplexity(sums: Array, examples: int) -> Array:
    return np.array([perplexity(loss) for loss in _ratio(sums, examples)])


def groups_of(examples: Sequence[TaskExample]) -> dict[str, list[int]]:
    """The examples of each group, in the order of the alphabet, and of all."""
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        if example.group:
            groups.setdefault(example.group, []).append(i)
    return {OVER_ALL: list(range(len(examples))), **dict(sorted(groups.items()))}


def over_groups(
    metrics: Mapping[str, tuple[Values, Array]], examples: Sequence[TaskExample]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, tuple[float, float]]]]:
    """Metrics, each given as its function of sums and its numbers [examples, numbers], and their 95 % intervals.

    Both by group and by name.
    """
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for group, chosen in groups_of(examples).items():
        here = {name: (function, rows[chosen]) for name, (function, rows) in metrics.items()}
        values[group] = {name: value(function, rows) for name, (function, rows) in here.items()}
        if len(chosen) > 1:
            intervals[group] = bootstrap.intervals(here)
    return values, intervals


def summed_up(
    values: Mapping[str, Mapping[str, float]],
    task: Task,
    examples: Sequence[TaskExample],
    unfinished: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """Values by group, with their means over groups ("accuracy_macro") and the numbers of examples.

    Where texts are generated, also with the numbers of `unfinished` ones, given for each example.
    """
    groups = groups_of(examples)
    found = {group: {**values[group], "n": float(len(chosen))} for group, chosen in groups.items()}
    named = [values[group] for group in groups if group != OVER_ALL]
    if named:
        for name in values[OVER_ALL]:
            if all(name in each for each in named):
                found[OVER_ALL][f"{name}_macro"] = math.fsum(each[name] for each in named) / len(named)
    if unfinished is not None:
        for group, chosen in groups.items():
            found[group][UNFINISHED] = float(sum(unfinished[i] for i in chosen))
    if task.truncate != "error":
        found[OVER_ALL][TRUNCATED] = float(sum(example.cut for example in examples))
    return found


def row_of(example: TaskExample, prediction: str | list[str] | None = None) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    group = {"group": example.group} if example.group else {}
    made = {} if prediction is None else {"prediction": prediction}
    return {"id": example.id, **group, "prompt": example.prompt, **made, "references": list(example.references)}


def _answer(text: str, pattern: str) -> str:
    """What the last match of a pattern, or its group, holds; nothing where there is none."""
    if not pattern:
        return text
    found = list(re.finditer(pattern, text))
    return (found[-1][found[-1].re.groups] or "").strip() if found else ""


def _check_room(model: Model, examples: Sequence[TaskExample], new: Sequence[int]) -> None:
    """Refuses what is too long for a model with learned positions, which has no others."""
    positions = model.config.positions
    if not positions:
        return
    for example, more in zip(examples, new, strict=True):
        if len(example.prompt_tokens) + more > positions:
            raise UserError(
                f"example {example.id}: its prompt has {len(example.prompt_tokens)} tokens, and with {more} more it is "
                f"too long for the model's {positions} positions; use fewer shots, or another model"
            )


def _progress(task: Task, total: int) -> Any:
    return tqdm(total=total, desc=task.name, unit=" texts", disable=None, leave=False)
