"""An evaluator holds the examples and what was compiled for them, and scores params as they come."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jax_it import data, losses, metrics, sharding
from jax_it.config import Config, Eval, Task
from jax_it.data import chat, tasks
from jax_it.data.batches import Encoded
from jax_it.data.evaluation_set import EvalSet
from jax_it.data.formats import Format, pack_rows
from jax_it.data.packing import Layout
from jax_it.data.tasks import TaskExample
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import Interrupted, UserError, first_line
from jax_it.evaluation.executed import Executed
from jax_it.evaluation.scorers import (
    TRUNCATED,
    UNFINISHED,
    Found,
    Generated,
    Perplexity,
    Ranked,
    Scorer,
    Setting,
    Stopped,
    ask,
)
from jax_it.generation import Engine, Sampling, generate
from jax_it.metrics.metric import perplexity
from jax_it.models import Model, Params
from jax_it.run import Run, make_format

ALL = "all"
WITHOUT_REFERENCE = "without_reference"
TASK = "task"  # the key of a whole task's error

SCORERS: dict[str, Callable[..., Scorer]] = {
    "generate": Generated, "multiple_choice": Ranked, "perplexity": Perplexity, "code_execution": Executed,
}  # fmt: skip


class Scored(NamedTuple):
    metrics: dict[str, dict[str, float]]
    """By task, and "all" of data.eval's examples, where there are any. `n` examples are scored; "all" also counts those
    left out and the prompts cut. Of eval.tasks by name, and "NAME/GROUP" where there are groups. Of generated texts
    `unfinished` ones reached max_new_tokens before they ended.
    """
    predictions: list[dict[str, Any]]  # id, task, prompt, prediction, references
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType({})  # by task and metric; 95 %
    errors: Mapping[str, Mapping[str, str]] = MappingProxyType({})  # by task: metrics that failed, or TASK if all did
    advice: str = ""  # metrics that cannot count the references' script


_PASSING = (Stopped, Interrupted)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _with(scored: Scored, task: str, found: Found) -> Scored:
    """What is scored so far, and what was found for one more task."""

    def named(by_group: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{task}/{group}" if group else task: values for group, values in by_group.items()}

    rows = [{"id": row["id"], "task": task, **row} for row in found.predictions]
    return Scored(
        {**scored.metrics, **named(found.metrics)},
        [*scored.predictions, *rows],
        {**scored.intervals, **named(found.intervals)},
        {**scored.errors, **named(found.errors)},
        "\n".join(dict.fromkeys(filter(None, (scored.advice, found.advice)))),
    )


class Needed(NamedTuple):
    """What a run is evaluated on."""

    examples: EvalSet | None
    tasks: dict[str, list[TaskExample]]  # by name


def read(config: Config, tokenizer: Tokenizer, format: Format) -> Needed:
    """Reads everything that the config's evaluation needs, whether it is within training or comes after it.

    Raises UserError for what is missing, empty or malformed, and for unknown metrics.
    """
    within = bool(config.eval.every.value or config.eval.at_start)
    examples = None
    if config.data.eval or within:
        examples = data.build_eval(config.data, tokenizer, format, config.eval.limit)
    if within and examples is None and not config.eval.tasks:
        raise UserError(
            "config.eval.every needs examples: set config.data.eval, config.data.validation_size or eval.tasks"
        )
    found = {}
    for number, task in enumerate(config.eval.tasks):
        found[task.name] = _read_task(number, task, config, tokenizer, format)
        if task.score == "generate":
            metrics.check(task.metrics, f"config.eval.tasks.{number}.metrics")
    return Needed(examples, found)


def within_training(run: Run) -> "Evaluator | None":
    """Return the evaluator of evaluation within training; None where the config asks for none.

    Everything that the config evaluates on is read either way, so that what `jax-it eval` would not find after
    training is refused before it.
    """
    config = run.config
    needed = read(config, run.tokenizer, run.format)
    if not (config.eval.every.value or config.eval.at_start):
        return None
    return Evaluator(run.model, run.tokenizer, needed.examples, config, run.layout, run.mesh, needed.tasks)


def _read_task(number: int, task: Task, config: Config, tokenizer: Tokenizer, format: Format) -> list[TaskExample]:
    where = f"config.eval.tasks.{number}"
    return tasks.read(task, where, config.data, tokenizer, format, config.eval.limit)


def _always() -> bool:
    return True


class Evaluator:
    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        examples: EvalSet | None,
        config: Config,
        layout: Layout,
        mesh: jax.sharding.Mesh,
        read: Mapping[str, list[TaskExample]] | None = None,
    ):
        """`read` holds the examples of tasks that are read already; those of others are when they are scored."""
        metrics.check(config.eval.metrics)
        self._setting = Setting(model, tokenizer, make_format(model, tokenizer), config, mesh)
        self._examples = None if examples is None else Examples(examples, self._setting, layout)
        self._scorers = {
            task.name: SCORERS[task.score](task, read[task.name], self._setting)
            for task in config.eval.tasks
            if read is not None
        }

    def __call__(self, params: Params, go_on: Callable[[], bool] = _always) -> Scored:
        """The scores of data.eval's examples, where there are any, and then of each of eval.tasks.

        A task that fails leaves its reason in `errors` and the others alone. `go_on` is asked before each batch,
        equally often on all hosts. Raises Stopped where it says no.
        """
        scored = Scored({}, [], {}, {})
        every = self._setting.config.eval.tasks
        if self._examples is not None:
            try:
                scored = self._examples(params, go_on)
            except Exception as error:
                if not every or isinstance(error, _PASSING):
                    raise
                scored = Scored({}, [], {}, {ALL: {TASK: _reason(error)}})
        for number, task in enumerate(every):
            try:
                scored = _with(scored, task.name, self._scorer(number, task)(params, go_on))
            except _PASSING:
                raise
            except Exception as error:  # of the model's code, say: it costs no other task its scores
                scored = scored._replace(errors={**scored.errors, task.name: {TASK: _reason(error)}})
        return scored

    def _scorer(self, number: int, task: Task) -> Scorer:
        """The task's scorer, with the examples that it read when it was first asked for."""
        if task.name not in self._scorers:
            examples = _read_task(number, task, self._setting.config, self._setting.tokenizer, self._setting.format)
            self._scorers[task.name] = SCORERS[task.score](task, examples, self._setting)
        return self._scorers[task.name]


class Examples:
    """The examples of data.eval, or those held out of data.train."""

    def __init__(self, examples: EvalSet, setting: Setting, layout: Layout):
        model, tokenizer, format, config, mesh = setting
        self._tokenizer, self._config = tokenizer, config
        self._examples = examples.examples
        self._left_out = {WITHOUT_REFERENCE: float(examples.skipped), TRUNCATED: float(examples.truncated)}
        encoded = [example.encoded for example in self._examples]
        self._loss = Loss(model, format, encoded, layout, config.train.loss_chunk, mesh)
        length = config.max_new_tokens(model.kind)
        rows = min(config.eval.batch_size, len(self._examples))
        self._engine = Engine(model, mesh, length, rows, _sampling(config.eval, tokenizer), chat.ends(tokenizer))

    def __call__(self, params: Params, go_on: Callable[[], bool]) -> Scored:
        """Loss per target token over all examples; the config's metrics for each task and over all."""
        loss = self._loss(params, go_on)
        overall = {"loss": loss, "perplexity": perplexity(loss), "n": float(len(self._examples)), **self._left_out}
        if not self._config.eval.generate:
            return Scored({ALL: overall}, [])
        texts, finished = self._predict(params, go_on)
        names = self._config.eval.metrics
        by_task: dict[str, list[int]] = {}
        for i, example in enumerate(self._examples):
            by_task.setdefault(example.task, []).append(i)
        groups = dict(sorted(by_task.items())) | {ALL: list(range(len(texts)))}
        references = [example.references for example in self._examples]
        found = metrics.measure(names, texts, references, groups)
        scores = {
            task: found[task].values
            | {"n": float(len(chosen)), UNFINISHED: float(sum(not finished[i] for i in chosen))}
            for task, chosen in groups.items()
        }
        scores[ALL] = overall | scores[ALL]
        predictions = [
            {"id": e.id, "task": e.task, "prompt": e.prompt, "prediction": text, "references": list(e.references)}
            for e, text in zip(self._examples, texts, strict=True)
        ]
        intervals = {task: measured.intervals for task, measured in found.items() if measured.intervals}
        errors = {task: measured.errors for task, measured in found.items() if measured.errors}
        return Scored(scores, predictions, intervals, errors, metrics.advice(names, references))

    def _predict(self, params: Params, go_on: Callable[[], bool]) -> tuple[list[str], list[bool]]:
        """A text for each example, and whether it ended before its limit."""
        texts, finished = [""] * len(self._examples), [False] * len(self._examples)
        prompts = [example.prompt_tokens for example in self._examples]
        with tqdm(total=len(texts), desc="generating", unit=" examples", disable=None, leave=False) as bar:
            for output in generate(self._engine, params, prompts):
                texts[output.request_id] = self._tokenizer.decode(output.tokens)
                finished[output.request_id] = output.finish_reason == "stop"
                bar.update()
                ask(go_on)
        return texts, finished


def _sampling(settings: Eval, tokenizer: Tokenizer) -> Sampling:
    token = settings.forced_bos_token
    first = tokenizer.id_of(token, "config.eval.forced_bos_token") if token else None
    return Sampling(
        num_beams=settings.num_beams, length_penalty=settings.length_penalty, early_stopping=settings.early_stopping,
        repetition_penalty=settings.repetition_penalty, min_new_tokens=settings.min_new_tokens, forced_bos_token=first,
    )  # fmt: skip


class Loss:
    """Cross-entropy in nats a target token, over packed rows of one compiled shape."""

    def __init__(
        self, model: Model, format: Format, examples: Sequence[Encoded], layout: Layout, chunk: int,
        mesh: jax.sharding.Mesh,
    ):  # fmt: skip
        self._mesh = mesh
        self._batches = pack_rows(format, examples, layout, sharding.shared_out(layout.rows, mesh))

        def loss_sum(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
            states_BTD, head_VD = model.apply(params, batch), model.head(params)
            return losses.chunked_sum(
                losses.cross_entropy, model.logits, chunk, head_VD, states_BTD, batch.targets_BT, batch.weights_BT
            )

        self._loss_sum = jax.jit(loss_sum, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Params, go_on: Callable[[], bool] = _always) -> float:
        with jax.set_mesh(self._mesh):
            sums: list[tuple[jax.Array, jax.Array]] = []
            for batch in self._batches:
                ask(go_on)
                sums.append(self._loss_sum(params, sharding.place(batch, self._mesh)))
                jax.block_until_ready(sums[-2:-1])  # one batch ahead, and no more: a stop need not wait for the rest
        total, weight = np.array([(0.0, 0.0), *((float(a), float(b)) for a, b in sums)]).sum(0)
        return float(total / weight) if weight else math.nan
