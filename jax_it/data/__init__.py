"""From files to batches: `build` shows the whole chain.

A record becomes turns by a template, these become token ids and a loss mask, examples share rows, rows make a batch.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from jax_it import files, hosts
from jax_it.config import Config, Data, Source
from jax_it.data import evaluation_set, mixture, sources, tokenized
from jax_it.data.formats import Format
from jax_it.data.loader import TrainData
from jax_it.data.packing import Shape
from jax_it.data.tokenized import Tokenized
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError

SAMPLE = 8192  # examples that the choice of row lengths looks at


@dataclass(frozen=True)
class Built:
    train: TrainData
    tokenized: list[list[Tokenized]]  # by source, by template: what became of each data set
    digest: str  # of all training data; a resumed run must find the same


def pin(config: Config, commits: Mapping[str, str] | None = None) -> tuple[Config, Mapping[str, str]]:
    """Return the config with the commits of its hub data sets as revisions, and these commits by "NAME@REVISION".

    They are what the revisions refer to now, or `commits`, where a run has them from its start.
    """
    if commits is None:
        commits = json.loads(hosts.from_first(lambda: json.dumps(_commits(config))))
    known: Mapping[str, str] = commits

    def pinned(source: Source) -> Source:
        return replace(source, revision=known.get(_requested(source), source.revision))

    data, tasks = config.data, config.eval.tasks
    data = replace(data, train=tuple(map(pinned, data.train)), eval=tuple(map(pinned, data.eval)))
    tasks = tuple(replace(task, data=pinned(task.data), fewshot=pinned(task.fewshot)) for task in tasks)
    return replace(config, data=data, eval=replace(config.eval, tasks=tasks)), known


def _commits(config: Config) -> dict[str, str]:
    """Return what the revisions of the config's hub data sets refer to now."""
    every = [(source, f"config.data.train.{i}") for i, source in enumerate(config.data.train)]
    every += [(source, f"config.data.eval.{i}") for i, source in enumerate(config.data.eval)]
    for i, task in enumerate(config.eval.tasks):
        if task.score == "lm_eval":  # it reads its data itself
            continue
        every.append((task.data, f"config.eval.tasks.{i}.data"))
        if task.fewshot.path:
            every.append((task.fewshot, f"config.eval.tasks.{i}.fewshot"))
    return {_requested(source): commit for source, where in every if (commit := sources.commit(source, where))}


def _requested(source: Source) -> str:
    return f"{source.path}@{source.revision}"


def build(
    data: Data, tokenizer: Tokenizer, format: Format, batch_size: int, row_cost: Callable[[Shape], float]
) -> Built:
    """Return training data: records -> turns -> token ids with a loss mask (cached) -> rows -> batches by step.

    `row_cost` is the cost of a row of some shape in the training step; the shape is chosen by it.
    """
    made = _tokenize(data, tokenizer, format)
    held_out = [mixture.hold_out(templates, data.validation_size, data.seed) for templates in made]
    mixed = mixture.mix(data.train, made, data, held_out)
    sample = mixed.epoch(0)[:SAMPLE]
    every = [each for templates in made for each in templates]
    longest = (
        max(int(each.source_lengths.max(initial=0)) for each in every),
        max(int(each.target_lengths.max(initial=0)) for each in every),
    )
    layout = format.layout(sample["source_length"], sample["target_length"], longest, data, batch_size, row_cost)
    digest = ":".join(templates[0].digest for templates in made)
    return Built(TrainData(mixed, format, layout, data.packing), made, digest)


def build_eval(
    data: Data, tokenizer: Tokenizer, format: Format, limit: int, strict: bool = True
) -> evaluation_set.EvalSet | None:
    """Read the examples to evaluate on: `data.eval`, or what is held out of `data.train`; None where neither is set.

    Raises UserError for a source that cannot be read. Unless `strict`: then one of `data.eval` is left out, and the
    reason is in the set's `errors`.
    """
    if data.eval:
        return evaluation_set.read(data.eval, "config.data.eval", data, tokenizer, format, limit, strict=strict)
    if not data.validation_size:
        return None
    made = _tokenize(data, tokenizer, format)
    held_out = [mixture.hold_out(templates, data.validation_size, data.seed) for templates in made]
    return evaluation_set.read(data.train, "config.data.train", data, tokenizer, format, limit, held_out)


def tokenize(data: Data, tokenizer: Tokenizer, format: Format, output: str) -> list[list[Tokenized]]:
    """Tokenize the training data into a new folder, which `data.tokenized` names to train from it on any machine.

    All processor cores work, unless `data.num_workers` says otherwise. Returns what became of each data set, by source,
    by template. Raises UserError as `build` does, and for a folder that exists.
    """
    if os.path.lexists(files.locate_local(output, "--output")):  # before hours of work
        raise UserError(f"--output: {output} already exists; name another, or remove it")
    made = _tokenize(replace(data, num_workers=data.num_workers or os.cpu_count() or 1), tokenizer, format)
    tokenized.save(made, output, data, tokenizer, format)
    return made


def _tokenize(data: Data, tokenizer: Tokenizer, format: Format) -> list[list[Tokenized]]:
    if data.tokenized:
        return tokenized.load(data, tokenizer, format)
    return [
        tokenized.tokenize(source, f"config.data.train.{i}", data, tokenizer, format)
        for i, source in enumerate(data.train)
    ]


def texts(items: tuple[Source, ...]) -> Iterator[str]:
    """Yield every prompt and completion of some data sets, for training a tokenizer."""
    return tokenized.prompts_and_completions(items, "config.data.train")
