"""Answers to the prompts of records; of several candidates a judge chooses the best, or rejects all."""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax_it.curation.build.requests import Generator, Reply, Request, ask, origin
from jax_it.curation.stage import Dropped, Kept, Outcome
from jax_it.data.records import Record
from jax_it.data.templates import Turn


def fault(reply: Reply) -> Dropped | None:
    """Return why a reply cannot be used, None if it can."""
    if reply.error:
        return Dropped("the endpoint refused the request", {"error": reply.error})
    if not reply.finished:
        return Dropped("an answer was cut at the most new tokens")
    return None if reply.text.strip() else Dropped("an answer is empty")


def answered(record: Record, turns: Sequence[Turn], answer: str, about: Mapping[str, Any]) -> Kept:
    """Return a record of these turns and the answer, with its id and task."""
    fields: dict[str, Any] = {name: record.fields[name] for name in ("id", "task") if name in record.fields}
    if len(turns) == 1:
        fields |= {"prompt": turns[0].text, "completion": answer}
    else:
        messages = [*turns, Turn("assistant", answer)]
        fields["messages"] = [{"role": turn.role, "content": turn.text} for turn in messages]
    return Kept(fields | {"origin": dict(about)})


def make(
    generator: Generator,
    judge: Generator,
    items: Sequence[tuple[Record, Sequence[Turn]]],
    candidates: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[Outcome]:
    """Return a record with an answer for each item, turns that end with the user's.

    Of several candidates the judge names the best; it is shown them in random order, each text once.
    """
    requests = [
        Request(
            tuple((turn.role, turn.text) for turn in turns),
            max_new_tokens,
            temperature,
            seed=seed * 1_000_003 + number,
        )
        for _, turns in items
        for number in range(candidates)
    ]
    replies = generator(requests)
    by_item = [replies[start : start + candidates] for start in range(0, len(replies), candidates)]
    usable = [list(dict.fromkeys(one.text.strip() for one in group if fault(one) is None)) for group in by_item]
    for (record, _), texts in zip(items, usable, strict=True):
        random.Random(f"{seed}:{record.where}").shuffle(texts)
    judged = [i for i, texts in enumerate(usable) if len(texts) > 1]
    verdicts = dict(zip(judged, judge([_judge(items[i][1], usable[i]) for i in judged]), strict=True))
    found: list[Outcome] = []
    for i, ((record, turns), texts) in enumerate(zip(items, usable, strict=True)):
        about = origin("answers", generator.name, [record.where], seed)
        if candidates > 1:
            about = {**about, "candidates": candidates, "judge": judge.name}
        if not texts:
            found.append(next(filter(None, map(fault, by_item[i]))))
        elif i not in verdicts:
            found.append(answered(record, turns, texts[0], about))
        elif verdicts[i].error:
            found.append(Dropped("the endpoint refused the request", {"error": verdicts[i].error}))
        else:
            chosen = _chosen(verdicts[i], len(texts))
            if chosen is None:
                found.append(Dropped("the judge named no answer", {"judge": verdicts[i].text[:200]}))
            elif chosen == 0:
                found.append(Dropped("the judge rejected all answers"))
            else:
                found.append(answered(record, turns, texts[chosen - 1], about))
    return found


def _judge(turns: Sequence[Turn], texts: Sequence[str]) -> Request:
    task = "\n\n".join(f"[{turn.role}]\n{turn.text}" for turn in turns)
    answers = "\n\n".join(f"[Answer {number}]\n{text}" for number, text in enumerate(texts, 1))
    return ask(
        f"Here are a conversation and {len(texts)} answers to its last message.\n\n{task}\n\n{answers}\n\n"
        "Which answer is best: correct, complete and helpful? Reply with its number alone, or with 0 if every answer "
        "is wrong or harmful.",
        max_new_tokens=16,
    )


def _chosen(reply: Reply, number: int) -> int | None:
    """Return the number that the judge names, 0 for none of the answers; None if it names no answer."""
    named = re.search(r"\d+", reply.text)
    return int(named[0]) if named and len(named[0]) < 4 and int(named[0]) <= number else None
