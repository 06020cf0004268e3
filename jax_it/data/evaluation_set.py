"""Examples to evaluate on: tokens for the model, texts for the metrics. This reads those of `data.eval`.

`data/tasks.py` reads the examples of `eval.tasks`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jax_it.config import Data, Source
from jax_it.data import promptsource, sources, templates
from jax_it.data.encoded import Encoded
from jax_it.data.encoding import Counts
from jax_it.data.formats import CausalFormat, Format
from jax_it.data.records import InvalidRecord, Record
from jax_it.data.templates import Example
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError


class Option(NamedTuple):
    text: str
    prompt: list[int]  # what the model continues
    tokens: list[int]  # those that are scored: with the end token for an encoder-decoder, without it for a causal model


class EvalExample(NamedTuple):
    id: str
    group: str  # for data.eval, the record's task; "" where there are no groups
    prompt: str
    prompt_tokens: list[int]  # what generation starts from
    references: tuple[str, ...]  # may be empty for score="code_execution"
    truncated: bool = False  # the prompt is not whole, or lacks few-shot examples
    encoded: Encoded | None = None  # for data.eval: the prompt and the first reference, truncated as in training
    options: tuple[Option, ...] = ()  # for score="multiple_choice"; for "perplexity", the reference
    fields: Mapping[str, Any] = MappingProxyType({})  # for a task: the record


class EvalSet(NamedTuple):
    examples: list[EvalExample]
    skipped: int = 0  # records without a reference, and those that are invalid, where data.on_invalid drops them
    errors: Mapping[str, str] = MappingProxyType({})  # by name: why a source could not be read


def read(
    items: Sequence[Source],
    where: str,
    data: Data,
    tokenizer: Tokenizer,
    format: Format,
    limit: int,
    only: Sequence[np.ndarray] | None = None,
    strict: bool = True,
) -> EvalSet:
    """Read the examples of some sources; `only` names the records of each to take, `limit` how many at most.

    Raises UserError for a source that cannot be read, and where no record has a reference. Unless `strict`: then the
    reason is in `errors`.

    A record's task is its field "task", or else its source's name. Where a source has several templates, its records
    take them in turn. References without text are skipped. A prompt that is too long is truncated also with
    truncate="drop": a score over fewer examples would not be comparable.
    """
    parts: list[EvalSet] = []
    errors: dict[str, str] = {}
    for i, source in enumerate(items):
        try:
            wanted = None if only is None else set(only[i].tolist())
            parts.append(_read_one(source, f"{where}.{i}", data, tokenizer, format, limit, wanted))
        except UserError as error:
            if strict:
                raise
            errors[sources.name_of(source)] = str(error)
    examples, skipped = [example for part in parts for example in part.examples], sum(part.skipped for part in parts)
    if parts and not examples:
        errors[where] = f"{where}: none of {skipped} examples has a reference to compare with"
        if strict:
            raise UserError(errors[where])
    return EvalSet(examples, skipped, errors)


def _printable(record: Record, name: str) -> Any:
    """Return a field that names the example in files and tables."""
    value = record.fields.get(name)
    try:
        str(value).encode()
    except (UnicodeEncodeError, RecursionError, ValueError):  # half a surrogate pair; nesting; thousands of digits
        raise UserError(f"{record.where}: the field {name!r} cannot be written as text; fix or remove it") from None
    return value


def _read_one(
    source: Source,
    where: str,
    data: Data,
    tokenizer: Tokenizer,
    format: Format,
    limit: int,
    wanted: set[int] | None,
) -> EvalSet:
    chosen: list[EvalExample] = []
    rendered: list[Example] = []
    locations: list[str] = []
    skipped = 0
    name = sources.name_of(source)
    every_template = promptsource.expand(source.template, f"{where}.template")
    most = min([n for n in (limit, None if wanted is None else len(wanted)) if n], default=0)
    numbered = enumerate(sources.read(source, where, keep_invalid=True))
    every = ((i, record) for i, record in numbered if wanted is None or i in wanted)
    invalid = Counts()
    for number, record in itertools.islice(every, most or None):  # the rest is not read
        try:
            example = templates.render(record, every_template[number % len(every_template)].text)
        except InvalidRecord as error:
            invalid.add_invalid(error)
            continue
        references = tuple(reference for reference in example.references if reference.strip())
        if not references:
            skipped += 1
            continue
        id, task = (_printable(record, name) for name in ("id", "task"))
        chosen.append(
            EvalExample(
                id=f"{name}/{number}" if id is None else str(id),
                group=task if isinstance(task, str) else name,
                prompt=example.prompt,
                prompt_tokens=[],
                references=references,
            )
        )
        answer = example.turns[-1]._replace(text=references[0], train=True)
        rendered.append(Example((*example.turns[:-1], answer), references))
        locations.append(record.where)
    invalid.examples += len(chosen) + skipped
    invalid.check_invalid(name, data)
    counts = Counts()
    encoded = _encode_each(rendered, locations, data, tokenizer, format, counts)
    examples: list[EvalExample] = []
    for unencoded, location in zip(chosen, locations, strict=True):
        before = dataclasses.replace(counts)
        item = next(encoded)
        if item is None:  # the chat template refuses it
            skipped += 1
            continue
        truncated = counts.cut_prompts > before.cut_prompts
        if truncated and data.truncate == "error":
            number, what = counts.source_tokens - before.source_tokens, "source "
            if isinstance(format, CausalFormat):
                number, what = number + counts.target_tokens - before.target_tokens, ""
            raise UserError(
                f"{location}: {number} {what}tokens exceed the limit of {getattr(data, format.length_field)}; "
                f"raise config.data.{format.length_field}, or choose another config.data.truncate"
            )
        examples.append(unencoded._replace(prompt_tokens=format.prompt_of(item), truncated=truncated, encoded=item))
    return EvalSet(examples, skipped + invalid.invalid)


def _encode_each(
    rendered: Sequence[Example],
    locations: Sequence[str],
    data: Data,
    tokenizer: Tokenizer,
    format: Format,
    counts: Counts,
) -> Iterator[Encoded | None]:
    """Yield each example's tokens; if invalid records are dropped, None for one that the chat template refuses."""
    if data.on_invalid == "error":
        yield from format.encode(rendered, locations, data, tokenizer, counts, evaluation=True)
        return
    for example, location in zip(rendered, locations, strict=True):
        try:
            yield from format.encode([example], [location], data, tokenizer, counts, evaluation=True)
        except InvalidRecord:
            yield None
