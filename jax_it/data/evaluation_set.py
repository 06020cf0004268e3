"""Examples to evaluate on: tokens for the model, texts for the metrics."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_it.config import Data, Source
from jax_it.data import sources, templates
from jax_it.data.batches import Encoded
from jax_it.data.encoding import Counts
from jax_it.data.formats import CausalFormat, Format
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError


class EvalExample(NamedTuple):
    id: str
    task: str
    prompt: str
    references: tuple[str, ...]
    prompt_tokens: list[int]  # what generation starts from
    encoded: Encoded  # what the loss is taken on: the prompt and the first reference, cut as in training


class EvalSet(NamedTuple):
    examples: list[EvalExample]
    skipped: int  # without a reference
    truncated: int  # prompts


def read(
    items: Sequence[Source],
    where: str,
    data: Data,
    tokenizer: Tokenizer,
    format: Format,
    limit: int,
    only: Sequence[np.ndarray] | None,
    unread: dict[str, str] | None = None,
) -> EvalSet | None:
    """The examples of some sources; `only` names the records of each to take, `limit` how many at most.

    Where `unread` is given, a source at fault is left out and put there, by its name, with what is wrong with it;
    None comes back if there is no other. Without it that is a UserError.

    A record's task is its field "task", or else its source's name. Where a source has several
    templates, its records take them in turn. References without text are left out. Too long a prompt is
    cut also with truncate="drop": a score over fewer examples would not compare.
    """
    parts: list[EvalSet] = []
    for i, source in enumerate(items):
        try:
            wanted = None if only is None else set(only[i].tolist())
            parts.append(_read_one(source, f"{where}.{i}", data, tokenizer, format, limit, wanted))
        except UserError as error:
            if unread is None:
                raise
            unread[sources.name_of(source)] = str(error)
    together = EvalSet(
        [example for part in parts for example in part.examples],
        sum(part.skipped for part in parts),
        sum(part.truncated for part in parts),
    )
    if not together.examples:
        reason = f"{where}: none of {together.skipped} examples has a reference to compare with"
        if unread is None:
            raise UserError(reason)
        if parts:
            unread[where] = reason
        return None
    return together


def _printable(record: sources.Record, name: str) -> Any:
    """A field that names the example in files and tables."""
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
    places: list[str] = []
    skipped = 0
    name = sources.name_of(source)
    most = min([n for n in (limit, None if wanted is None else len(wanted)) if n], default=0)
    every = ((i, record) for i, record in enumerate(sources.read(source, where)) if wanted is None or i in wanted)
    for number, record in itertools.islice(every, most or None):  # the rest is not read
        example = templates.render(record, source.template[number % len(source.template)])
        references = tuple(reference for reference in example.references if reference.strip())
        if not references:
            skipped += 1
            continue
        id, task = (_printable(record, name) for name in ("id", "task"))
        chosen.append(
            EvalExample(
                id=f"{name}/{number}" if id is None else str(id),
                task=task if isinstance(task, str) else name,
                prompt=example.prompt,
                references=references,
                prompt_tokens=[],
                encoded=Encoded(np.zeros(0, np.int32), np.zeros(0, np.int32)),
            )
        )
        rendered.append(Example((*example.turns[:-1], Turn("assistant", references[0])), references))
        places.append(record.where)
    counts = Counts()
    encoded = format.encode(rendered, places, data, tokenizer, counts, evaluation=True)
    examples, truncated = [], 0
    for answered, place in zip(chosen, places, strict=True):
        before = dataclasses.replace(counts)
        item = next(encoded)
        assert item is not None  # as there is a reference
        if counts.cut_prompts > before.cut_prompts:
            truncated += 1
            if data.truncate == "error":
                number, what = counts.source_tokens - before.source_tokens, "source "
                if isinstance(format, CausalFormat):
                    number, what = number + counts.target_tokens - before.target_tokens, ""
                raise UserError(
                    f"{place}: {number} {what}tokens do not fit {getattr(data, format.length_field)}; "
                    f"raise config.data.{format.length_field}, or choose another config.data.truncate"
                )
        examples.append(answered._replace(prompt_tokens=format.prompt_of(item), encoded=item))
    return EvalSet(examples, skipped, truncated)
