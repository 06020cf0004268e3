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
    templates, its records take them in turn.
    """
    chosen: list[tuple[str, str, templates.Example]] = []
    for i, source in enumerate(items):
        wanted = None if only is None else set(only[i].tolist())
        taken = 0
        for number, record in enumerate(sources.read(source, f"{where}.{i}")):
            if (wanted is not None and number not in wanted) or (limit and taken == limit):
                continue
            taken += 1
            example = templates.render(record, source.template[number % len(source.template)])
            name = sources.name_of(source)
            task = record.fields.get("task")
            chosen.append(
                (str(record.fields.get("id", f"{name}/{number}")), task if isinstance(task, str) else name, example)
            )
    answered = [item for item in chosen if any(reference.strip() for reference in item[2].references)]
    if not answered:
        raise UserError(f"{where}: none of {len(chosen)} examples has a reference to compare with")
    prompts = tokenizer.encode([example.prompt for _, _, example in answered])
    completions = tokenizer.encode([example.completion for _, _, example in answered])
    room = data.source_length - 1
    examples = [
        EvalExample(
            id=id,
            task=task,
            prompt=example.prompt,
            references=tuple(reference for reference in example.references if reference.strip()),
            source=[*(prompt[-room:] if data.truncate == "start" else prompt[:room]), tokenizer.end],
            target=[*completion[: data.target_length - 1], tokenizer.end],
        )
        for (id, task, example), prompt, completion in zip(answered, prompts, completions, strict=True)
    ]
    return EvalSet(examples, len(chosen) - len(answered), sum(len(prompt) > room for prompt in prompts))
