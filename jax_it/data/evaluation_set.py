"""Examples to evaluate on: tokens for the model, texts for the metrics."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jax_it.config import Data, Source
from jax_it.data import sources, templates
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError


class EvalExample(NamedTuple):
    id: str
    task: str
    prompt: str
    references: tuple[str, ...]
    source: list[int]  # tokens, with the end mark, cut to the config's length
    target: list[int]  # of the first reference


class EvalSet(NamedTuple):
    examples: list[EvalExample]
    skipped: int  # without a reference
    truncated: int  # prompts


def read(
    items: Sequence[Source], where: str, data: Data, tokenizer: Tokenizer, limit: int, only: Sequence[np.ndarray] | None
) -> EvalSet:
    """The examples of some sources; `only` names the records of each to take, `limit` how many at most.

    A record's task is its field "task", or else its source's name. Where a source has several
    templates, its records take them in turn. References without text are left out. Too long a prompt is
    cut also with truncate="drop": a score over fewer examples would not compare.
    """
    chosen: list[EvalExample] = []
    places: list[str] = []
    skipped = 0
    for i, source in enumerate(items):
        name = sources.name_of(source)
        wanted = None if only is None else set(only[i].tolist())
        taken = 0
        for number, record in enumerate(sources.read(source, f"{where}.{i}")):
            if (wanted is not None and number not in wanted) or (limit and taken == limit):
                continue
            taken += 1
            example = templates.render(record, source.template[number % len(source.template)])
            references = tuple(reference for reference in example.references if reference.strip())
            if not references:
                skipped += 1
                continue
            id, task = record.fields.get("id"), record.fields.get("task")
            chosen.append(
                EvalExample(
                    id=f"{name}/{number}" if id is None else str(id),
                    task=task if isinstance(task, str) else name,
                    prompt=example.prompt,
                    references=references,
                    source=[],
                    target=[],
                )
            )
            places.append(record.where)
    if not chosen:
        raise UserError(f"{where}: none of {skipped} examples has a reference to compare with")
    prompts = tokenizer.encode([example.prompt for example in chosen])
    completions = tokenizer.encode([example.references[0] for example in chosen])
    room = data.source_length - 1
    if data.truncate == "refuse":
        for place, prompt in zip(places, prompts, strict=True):
            if len(prompt) > room:
                raise UserError(
                    f"{place}: {len(prompt) + 1} source tokens do not fit {data.source_length}; "
                    "raise config.data.source_length, or choose another config.data.truncate"
                )
    examples = [
        example._replace(
            source=[*(prompt[-room:] if data.truncate == "start" else prompt[:room]), tokenizer.end],
            target=[*completion[: data.target_length - 1], tokenizer.end],
        )
        for example, prompt, completion in zip(chosen, prompts, completions, strict=True)
    ]
    return EvalSet(examples, skipped, sum(len(prompt) > room for prompt in prompts))
