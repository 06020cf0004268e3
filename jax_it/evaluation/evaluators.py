"""The kinds of evaluation. Each is an `Evaluator`: it is called with params and returns a `Result`.

`suite.py` makes those that a config asks for and calls them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jax_it import losses, metrics, sharding
from jax_it.config import Eval, Task
from jax_it.data import chat
from jax_it.data.evaluation_set import EvalExample, EvalSet
from jax_it.data.formats import pack_rows
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.generation import Engine, Sampling, StopStrings, generate
from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods
from jax_it.metrics import Result, bootstrap
from jax_it.metrics.metric import Array, Values, percent, perplexity, value
from jax_it.models import Model, Params
from jax_it.run import Run
from jax_it.status import Bar

ALL = "all"  # name of the built-in task that scores data.eval; the names of its groups have no prefix
TASK = "task"  # the key in a task's errors of why it failed as a whole
TRUNCATED = "truncated"
UNFINISHED = "unfinished"  # texts that reached max_new_tokens before they ended
WITHOUT_REFERENCE = "without_reference"
CONTEXT = 4  # tokens of the prompt that new ones are decoded with


class Evaluator(Protocol):
    """Made once for all params: it keeps its examples and what was compiled for them.

    The scores of a task are called "TASK", and "TASK/GROUP" where there are groups. `n` examples are scored. Of
    generated texts `unfinished` ones reached max_new_tokens before they ended.
    """

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> Result:
        """Score params.

        `should_stop` is called between batches, equally often on all hosts. Raises Stopped where it returns True.
        """


class Stopped(Exception):
    """An evaluation was stopped between two batches."""


def check_stop(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Stopped


class Loss:
    """The loss of examples, in nats per target token, over packed rows of one compiled shape."""

    def __init__(self, examples: Sequence[EvalExample], run: Run):
        model, self._mesh, layout = run.model, run.mesh, run.layout
        encoded = [example.encoded for example in examples if example.encoded is not None]
        self._batches = pack_rows(run.format, encoded, layout, sharding.round_up_to_shards(layout.rows, self._mesh))

        def loss_sum(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
            states_BTD, head_VD = model.hidden_states(params, batch)[0], model.head(params)
            return losses.chunked_sum(
                losses.cross_entropy, model.logits, run.config.train.loss_chunk, head_VD, states_BTD, batch.targets_BT,
                batch.weights_BT,
            )  # fmt: skip

        self._loss_sum = jax.jit(loss_sum, out_shardings=sharding.replicated(self._mesh))

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> float:
        with jax.set_mesh(self._mesh):
            sums: list[tuple[jax.Array, jax.Array]] = []
            for batch in self._batches:
                check_stop(should_stop)
                sums.append(self._loss_sum(params, sharding.place(batch, self._mesh)))
                jax.block_until_ready(sums[-2:-1])  # compute at most one batch ahead, so that a stop is quick
        total, weight = np.array([(0.0, 0.0), *((float(a), float(b)) for a, b in sums)]).sum(0)
        return float(total / weight) if weight else math.nan


class HeldOut:
    """The examples of data.eval, or those held out of data.train: their loss, and eval.metrics of generated text.

    "all" also counts the examples without a reference and the prompts that were truncated.
    """

    def __init__(self, examples: EvalSet, run: Run):
        config = run.config
        self._examples = examples
        self._loss = Loss(examples.examples, run)
        self._generate: Generate | None = None
        if examples.examples and config.eval.generate:
            length = config.max_new_tokens(run.model.kind)
            task = Task(ALL, metrics=config.eval.metrics, max_new_tokens=length)
            self._generate = Generate(task, examples.examples, run, _sampling(config.eval, run.tokenizer))

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> Result:
        examples, skipped, errors = self._examples
        unreadable = {name: {TASK: reason} for name, reason in errors.items()}
        if not examples:
            return Result({}, [], errors=unreadable)
        loss = self._loss(params, should_stop)
        overall = {"loss": loss, "perplexity": perplexity(loss), "n": float(len(examples))}
        overall |= {WITHOUT_REFERENCE: float(skipped), TRUNCATED: float(sum(e.truncated for e in examples))}
        result = self._generate(params, should_stop) if self._generate else Result({}, [])
        overall |= result.metrics.pop(ALL, {})
        return result._replace(metrics={**result.metrics, ALL: overall}, errors=unreadable | dict(result.errors))


def _sampling(settings: Eval, tokenizer: Tokenizer) -> Sampling:
    token = settings.forced_bos_token
    first = tokenizer.id_of(token, "config.eval.forced_bos_token") if token else None
    return Sampling(
        num_beams=settings.num_beams, length_penalty=settings.length_penalty, early_stopping=settings.early_stopping,
        repetition_penalty=settings.repetition_penalty, min_new_tokens=settings.min_new_tokens, forced_bos_token=first,
        prompt_lookup_num_tokens=settings.prompt_lookup_num_tokens,
    )  # fmt: skip


class Samples:
    """Generates `task.samples` texts for each example, each cut at the task's stop strings."""

    def __init__(self, task: Task, examples: Sequence[EvalExample], run: Run, sampling: Sampling | None = None):
        model, tokenizer = run.model, run.tokenizer
        self._task, self._examples, self._tokenizer = task, examples, tokenizer
        # The texts of data.eval are those of `jax-it generate`; those of tasks keep the space that they begin with.
        self._in_context = model.kind == "causal" and task.name != ALL
        _check_positions(model, examples, [task.max_new_tokens] * len(examples))
        sampling = sampling or Sampling(task.temperature, top_p=task.top_p, seed=task.seed, num_samples=task.samples)
        self._stop = StopStrings(task.stop, tokenizer.decode)
        rows = min(run.config.eval.batch_size, len(examples) * task.samples)
        self._engine = Engine(model, run.mesh, task.max_new_tokens, rows, sampling, chat.ends(tokenizer))

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> tuple[list[list[str]], list[int]]:
        """Return the texts of each example, and how many of them are unfinished."""
        unfinished = [0] * len(self._examples)
        texts = [[""] * self._task.samples for _ in self._examples]
        prompts = [example.prompt_tokens for example in self._examples]
        with _progress(self._task, len(texts) * self._task.samples) as bar:
            for output in generate(self._engine, params, prompts, stop=self._stop if self._task.stop else None):
                decoded = self._decode(prompts[output.request_id], output.tokens)
                texts[output.request_id][output.sample] = self._stop.cut(decoded)
                unfinished[output.request_id] += output.finish_reason != "stop"
                bar.update()
                check_stop(should_stop)
        return texts, unfinished

    def _decode(self, prompt: list[int], tokens: list[int]) -> str:
        """Return what the tokens add to the prompt: some tokenizers drop the space that a text begins with."""
        if not self._in_context:
            return self._tokenizer.decode(tokens)
        before = prompt[-CONTEXT:]
        return self._tokenizer.decode([*before, *tokens])[len(self._tokenizer.decode(before)) :]


class Generate:
    """score="generate": metrics of generated text against references. Each of several samples counts as one text."""

    def __init__(self, task: Task, examples: Sequence[EvalExample], run: Run, sampling: Sampling | None = None):
        metrics.check(task.metrics, "config.eval.metrics" if task.name == ALL else f"the metrics of task {task.name}")
        self._task, self._examples = task, examples
        self._samples = Samples(task, examples, run, sampling)

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> Result:
        task, several = self._task, self._task.samples > 1
        texts, unfinished = self._samples(params, should_stop)
        answers = [[_answer(text, task.answer) for text in each] for each in texts]
        flat = [answer for each in answers for answer in each]
        references = [example.references for example in self._examples for _ in range(task.samples)]
        groups = {
            group: [i * task.samples + sample for i in chosen for sample in range(task.samples)]
            for group, chosen in groups_of(task, self._examples).items()
        }
        rows = []
        for example, raw, answer in zip(self._examples, texts, answers, strict=True):
            row = prediction_row(task, example, raw if several else raw[0])
            rows.append(row | ({"answer": answer if several else answer[0]} if task.answer else {}))
        result = metrics.measure(task.metrics, flat, references, groups, resamples=0 if several else 1000)
        return with_counts(result._replace(predictions=rows), task, self._examples, unfinished)


class _OptionLikelihoods:
    """Computes the log-likelihoods of the examples' options."""

    def __init__(self, task: Task, examples: Sequence[EvalExample], run: Run):
        self._task, self._examples = task, examples
        longest = [max(len(option.tokens) for option in example.options) for example in examples]
        _check_positions(run.model, examples, longest)
        self._likelihoods = Likelihoods(run.model, run.mesh, run.config.eval.batch_size)

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> list[list[float]]:
        # An option may change how the prompt's last characters are tokenized: then it has a prompt of its own.
        requests: list[LikelihoodRequest] = []
        owners: list[tuple[int, list[int]]] = []  # of each request: the example, and which of its options
        for i, example in enumerate(self._examples):
            by_prompt: dict[tuple[int, ...], list[int]] = {}
            for number, option in enumerate(example.options):
                by_prompt.setdefault(tuple(option.prompt), []).append(number)
            for prompt, numbers in by_prompt.items():
                requests.append(LikelihoodRequest(prompt, [example.options[number].tokens for number in numbers]))
                owners.append((i, numbers))
        log_probs = [[math.nan] * len(example.options) for example in self._examples]
        with _progress(self._task, len(requests)) as bar:
            for index, likelihoods in self._likelihoods(params, requests):
                i, numbers = owners[index]
                for number, likelihood in zip(numbers, likelihoods, strict=True):
                    log_probs[i][number] = likelihood.log_prob
                bar.update()
                check_stop(should_stop)
        return log_probs


class MultipleChoice:
    """score="multiple_choice": accuracy of the likeliest option, by log-likelihood or that divided by length."""

    def __init__(self, task: Task, examples: Sequence[EvalExample], run: Run):
        self._task, self._examples = task, examples
        self._log_probs = _OptionLikelihoods(task, examples, run)

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> Result:
        rows, right = [], np.zeros((len(self._examples), 1))
        for i, log_probs in enumerate(self._log_probs(params, should_stop)):
            example = self._examples[i]
            scores = [log_prob / self._length(n, example) for n, log_prob in enumerate(log_probs)]
            chosen = example.options[int(np.argmax(scores))].text
            right[i] = chosen == example.references[0]
            options = [option.text for option in example.options]
            rows.append(
                prediction_row(self._task, example, chosen) | {"options": options, "log_likelihoods": log_probs}
            )
        result = measure_groups({"accuracy": (percent, right)}, self._task, self._examples)
        return with_counts(result._replace(predictions=rows), self._task, self._examples)

    def _length(self, number: int, example: EvalExample) -> int:
        option = example.options[number]
        return {"none": 1, "tokens": len(option.tokens), "characters": len(option.text)}[self._task.normalize]


class Perplexity:
    """score="perplexity": of the references after their prompts; "loss" is its logarithm, in nats per token."""

    def __init__(self, task: Task, examples: Sequence[EvalExample], run: Run):
        self._task, self._examples = task, examples
        self._log_probs = _OptionLikelihoods(task, examples, run)

    def __call__(self, params: Params, should_stop: Callable[[], bool]) -> Result:
        log_probs = [log_prob for (log_prob,) in self._log_probs(params, should_stop)]
        lengths = [len(example.options[0].tokens) for example in self._examples]
        nats = np.array([[-log_prob, length] for log_prob, length in zip(log_probs, lengths, strict=True)])
        result = measure_groups({"loss": (_ratio, nats), "perplexity": (_perplexity, nats)}, self._task, self._examples)
        rows = [
            prediction_row(self._task, example) | {"log_likelihood": log_prob, "tokens": length}
            for example, log_prob, length in zip(self._examples, log_probs, lengths, strict=True)
        ]
        return with_counts(result._replace(predictions=rows), self._task, self._examples)


def _ratio(sums: Array, examples: int) -> Array:
    ratio: Array = sums[:, 0] / sums[:, 1]
    return ratio


def _perplexity(sums: Array, examples: int) -> Array:
    return np.array([perplexity(loss) for loss in _ratio(sums, examples)])


def groups_of(task: Task, examples: Sequence[EvalExample]) -> dict[str, list[int]]:
    """Return the indices of all examples, and of those of each group in alphabetical order, by what they are called."""
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        if example.group:
            groups.setdefault(example.group, []).append(i)
    overall = {task.name: list(range(len(examples)))}
    if task.name == ALL:
        return dict(sorted(groups.items())) | overall
    return overall | {f"{task.name}/{group}": chosen for group, chosen in sorted(groups.items())}


def measure_groups(metrics: Mapping[str, tuple[Values, Array]], task: Task, examples: Sequence[EvalExample]) -> Result:
    """Measure each group by metrics, given as their function of sums and their numbers [examples, numbers]."""
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for group, chosen in groups_of(task, examples).items():
        here = {name: (function, rows[chosen]) for name, (function, rows) in metrics.items()}
        values[group] = {name: value(function, rows) for name, (function, rows) in here.items()}
        if len(chosen) > 1:
            intervals[group] = bootstrap.intervals(here)
    return Result(values, [], intervals)


def with_counts(
    result: Result, task: Task, examples: Sequence[EvalExample], unfinished: Sequence[int] | None = None
) -> Result:
    """Add the numbers of examples, and of a task's groups the means ("accuracy_macro").

    Where texts are generated, also the numbers of `unfinished` ones, given for each example.
    """
    groups = groups_of(task, examples)
    found = {group: {**result.metrics[group], "n": float(len(chosen))} for group, chosen in groups.items()}
    overall = found[task.name]
    named = [result.metrics[group] for group in groups if group != task.name]
    if named and task.name != ALL:
        for name in result.metrics[task.name]:
            if all(name in each for each in named):
                overall[f"{name}_macro"] = math.fsum(each[name] for each in named) / len(named)
    if unfinished is not None:
        for group, chosen in groups.items():
            found[group][UNFINISHED] = float(sum(unfinished[i] for i in chosen))
    if task.truncate != "error":
        overall[TRUNCATED] = float(sum(example.truncated for example in examples))
    return result._replace(metrics=found)


def prediction_row(task: Task, example: EvalExample, prediction: str | list[str] | None = None) -> dict[str, Any]:
    """Return a line of predictions.jsonl."""
    row: dict[str, Any] = {"id": example.id, "task": example.group if task.name == ALL else task.name}
    if example.group and task.name != ALL:
        row["group"] = example.group
    row["prompt"] = example.prompt
    if prediction is not None:
        row["prediction"] = prediction
    return row | {"references": list(example.references)}


def _answer(text: str, pattern: str) -> str:
    """Return what the last match of a pattern, or its group, holds; "" where there is none."""
    if not pattern:
        return text
    found = list(re.finditer(pattern, text))
    return (found[-1][found[-1].re.groups] or "").strip() if found else ""


def _check_positions(model: Model, examples: Sequence[EvalExample], new: Sequence[int]) -> None:
    """Refuse prompts that are too long for a model with learned positions."""
    positions = model.config.positions
    if not positions:
        return
    for example, more in zip(examples, new, strict=True):
        if len(example.prompt_tokens) + more > positions:
            raise UserError(
                f"example {example.id}: its prompt has {len(example.prompt_tokens)} tokens, and with {more} more it is "
                f"too long for the model's {positions} positions; use fewer few-shot examples, or another model"
            )


def _progress(task: Task, total: int) -> Bar:
    return Bar(f"evaluating {'data.eval' if task.name == ALL else task.name}", total, "texts")
