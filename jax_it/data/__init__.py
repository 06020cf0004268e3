"""From files to batches. `build` shows the whole chain on one screen."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jax_it.config import Data, Source
from jax_it.data import evaluation_set, mixture, packing, sources, tokenized
from jax_it.data.batches import Seq2SeqFormat
from jax_it.data.loader import TrainData
from jax_it.data.packing import Layout, Shape
from jax_it.data.tokenized import Tokenized
from jax_it.data.tokenizer import Tokenizer

SAMPLE = 8192  # examples that the choice of row lengths looks at


@dataclass(frozen=True)
class Built:
    train: TrainData
    tokenized: list[list[Tokenized]]  # by source, by template: what became of each data set
    digest: str  # of all training data; a resumed run must find the same


def build(
    data: Data, tokenizer: Tokenizer, format: Seq2SeqFormat, batch_size: int, row_cost: Callable[[Shape], float]
) -> Built:
    """Training data: record -> template -> token ids (cached) -> mixture -> rows -> batches by step.

    `row_cost` says what a row of some shape costs in the training step; the shape is chosen by it.
    """
    made = [
        tokenized.tokenize(source, f"config.data.train.{i}", data, tokenizer) for i, source in enumerate(data.train)
    ]
    held_out = [mixture.hold_out(templates, data.holdout, data.seed) for templates in made]
    mixed = mixture.mix(data.train, made, data, held_out)
    layout = choose_layout(mixed, data, batch_size, row_cost)
    return Built(TrainData(mixed, format, layout, data.packing), made, digest(data))


def choose_layout(mixed: mixture.Mixture, data: Data, batch_size: int, row_cost: Callable[[Shape], float]) -> Layout:
    """The shape of rows and their number in a step."""
    smallest = Shape(1, data.source_length, data.target_length)
    sample = mixed.epoch(0).part(0, SAMPLE)
    if not data.packing:
        fills = sample.source_length.mean() / smallest.source, sample.target_length.mean() / smallest.target
        return Layout(smallest, batch_size, 1.0, *map(float, fills))
    given = None
    if data.packed_source_length:
        blocks = data.packed_source_length // data.source_length
        given = Shape(blocks, data.source_length, data.packed_target_length)
    return packing.choose_layout(sample.source_length, sample.target_length, batch_size, row_cost, given, smallest)


def build_eval(data: Data, tokenizer: Tokenizer, limit: int) -> evaluation_set.EvalSet | None:
    """The examples to evaluate on: `data.eval`, or what is held out of `data.train`; None where there are none."""
    if data.eval:
        return evaluation_set.read(data.eval, "config.data.eval", data, tokenizer, limit, None)
    if not data.holdout:
        return None
    made = [
        tokenized.tokenize(source, f"config.data.train.{i}", data, tokenizer) for i, source in enumerate(data.train)
    ]
    held_out = [mixture.hold_out(templates, data.holdout, data.seed) for templates in made]
    return evaluation_set.read(data.train, "config.data.train", data, tokenizer, limit, held_out)


def digest(data: Data) -> str:
    """A hash of the training data's bytes."""
    return ":".join(sources.digest(source, f"config.data.train.{i}") for i, source in enumerate(data.train))


def texts(items: tuple[Source, ...]) -> Any:
    """Every prompt and completion of some sources, for training a tokenizer."""
    return tokenized.prompts_and_completions(items, "config.data.train")


def describe(built: Built) -> list[dict[str, Any]]:
    """What became of each data set, as a table of plain values."""
    return [
        {"name": item.name, "template": item.template, **asdict(item.counts)}
        for templates in built.tokenized
        for item in templates
    ]
