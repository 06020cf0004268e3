"""An evaluator holds the examples and what was compiled for them, and scores params as they come."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jax_it import losses, metrics, sharding
from jax_it.config import Config
from jax_it.data import chat
from jax_it.data.batches import Encoded
from jax_it.data.evaluation_set import EvalSet
from jax_it.data.formats import Format, pack_rows
from jax_it.data.packing import Layout
from jax_it.data.tokenizer import Tokenizer
from jax_it.generation import Generator
from jax_it.models import Model, Params
from jax_it.workdir import make_format

ALL = "all"
WITHOUT_REFERENCE, TRUNCATED = "without_reference", "truncated"


class Scored(NamedTuple):
    metrics: dict[str, dict[str, float]]
    """By task, and "all". `n` examples are scored; "all" also counts those left out and the prompts cut."""
    predictions: list[dict[str, Any]]  # id, task, prompt, prediction, references
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType({})  # by task and metric; 95 %
    errors: Mapping[str, Mapping[str, str]] = MappingProxyType({})  # by task, of metrics that failed
    advice: str = ""  # metrics that cannot count the references' script


class Stopped(Exception):
    """An evaluation was left between two batches."""


def _always() -> bool:
    return True


class Evaluator:
    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        examples: EvalSet,
        config: Config,
        layout: Layout,
        mesh: jax.sharding.Mesh,
    ):
        metrics.check(config.eval.metrics)
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh
        self._examples = examples.examples
        self._left_out = {WITHOUT_REFERENCE: float(examples.skipped), TRUNCATED: float(examples.truncated)}
        encoded = [example.encoded for example in self._examples]
        self._loss = Loss(model, make_format(model, tokenizer), encoded, layout, config.train.loss_chunk, mesh)
        length = config.eval.max_new_tokens or config.data.target_length
        rows = min(config.eval.batch_size, len(self._examples))
        self._generate = Generator(model, mesh, length, rows, ends=chat.ends(tokenizer))

    def __call__(self, params: Params, go_on: Callable[[], bool] = _always) -> Scored:
        """Loss per target token over all examples; the config's metrics for each task and over all.

        `go_on` is asked before each batch, equally often on all hosts. Raises Stopped where it says no.
        """
        overall = {"loss": self._loss(params, go_on), "n": float(len(self._examples)), **self._left_out}
        if not self._config.eval.generate:
            return Scored({ALL: overall}, [])
        texts = self._predict(params, go_on)
        names = self._config.eval.metrics
        by_task: dict[str, list[int]] = {}
        for i, example in enumerate(self._examples):
            by_task.setdefault(example.task, []).append(i)
        groups = dict(sorted(by_task.items())) | {ALL: list(range(len(texts)))}
        references = [example.references for example in self._examples]
        found = metrics.measure(names, texts, references, groups)
        scores = {task: found[task].values | {"n": float(len(chosen))} for task, chosen in groups.items()}
        scores[ALL] = overall | scores[ALL]
        predictions = [
            {"id": e.id, "task": e.task, "prompt": e.prompt, "prediction": text, "references": list(e.references)}
            for e, text in zip(self._examples, texts, strict=True)
        ]
        intervals = {task: measured.intervals for task, measured in found.items() if measured.intervals}
        errors = {task: measured.errors for task, measured in found.items() if measured.errors}
        return Scored(scores, predictions, intervals, errors, metrics.advice(names, references))

    def _predict(self, params: Params, go_on: Callable[[], bool]) -> list[str]:
        texts = [""] * len(self._examples)
        prompts = [example.prompt_tokens for example in self._examples]
        with tqdm(total=len(texts), desc="generating", unit=" examples", disable=None, leave=False) as bar:
            for i, tokens in self._generate(params, prompts):
                texts[i] = self._tokenizer.decode(tokens)
                bar.update()
                _ask(go_on)
        return texts


def _ask(go_on: Callable[[], bool]) -> None:
    if not go_on():
        raise Stopped


class Loss:
    """Cross-entropy in nats a target token, over packed rows of one compiled shape."""

    def __init__(
        self, model: Model, format: Format, examples: Sequence[Encoded], layout: Layout, chunk: int,
        mesh: jax.sharding.Mesh,
    ):  # fmt: skip
        self._mesh = mesh
        parts = sharding.batch_parts(mesh)
        self._batches = pack_rows(format, examples, layout, -(-layout.rows // parts) * parts)
        self._loss_sum = jax.jit(
            partial(model.loss_sum, losses.cross_entropy, chunk), out_shardings=sharding.replicated(mesh)
        )

    def __call__(self, params: Params, go_on: Callable[[], bool] = _always) -> float:
        with jax.set_mesh(self._mesh):
            sums: list[tuple[jax.Array, jax.Array]] = []
            for batch in self._batches:
                _ask(go_on)
                sums.append(self._loss_sum(params, sharding.place(batch, self._mesh)))
                jax.block_until_ready(sums[-2:-1])  # one batch ahead, and no more: a stop need not wait for the rest
        total, weight = np.array([(0.0, 0.0), *((float(a), float(b)) for a, b in sums)]).sum(0)
        return float(total / weight) if weight else math.nan
