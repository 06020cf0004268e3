"""Evol-Instruct (Xu et al. 2023, WizardLM): instructions made harder, or others as rare in the same domain.

A rewriting is given up where it adds nothing or failed, in the paper's sense: the model calls the two instructions
equal, it repeats words of the prompt that asked for it, or its answer is an apology or has no words.
"""

import random
import re
from collections.abc import Sequence

from jax_it.curation.build import answers
from jax_it.curation.build.requests import Generator, Reply, Request, ask, origin
from jax_it.curation.stage import Dropped, Outcome
from jax_it.data.records import Record
from jax_it.data.templates import Turn

_DEPTH = (
    "Rewrite the instruction below so that it is somewhat harder, but still makes sense, can be answered in text, and "
    "says all that is needed to answer it. Keep any tables, code and input that it has. {how} Add 10 to 20 words at "
    "most. Reply with the new instruction alone."
)
METHODS = {
    "constraints": _DEPTH.format(how="Add one more constraint or requirement."),
    "deepening": _DEPTH.format(how="Ask about the matter in more depth and breadth."),
    "concretizing": _DEPTH.format(how="Replace general concepts with more specific ones."),
    "reasoning": _DEPTH.format(how="If it can be solved in a few simple steps, ask for reasoning in several steps."),
    "breadth": (
        "Write a new instruction inspired by the one below: in the same domain, about as long and as hard, but rarer. "
        "It must make sense and be answerable in text. Reply with the new instruction alone."
    ),
}
_LABEL = "### Instruction"
_REPEATED = re.compile(
    r"###|given (?:prompt|instruction)|(?:rewritten|new|created) (?:prompt|instruction)", re.IGNORECASE
)


def make(
    generator: Generator,
    items: Sequence[tuple[Record, Sequence[Turn]]],
    rounds: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[Outcome]:
    """Return, for each item, a record with its last turn evolved up to `rounds` times, and an answer to it.

    One that could not be evolved at all is dropped.
    """
    current = [turns[-1].text for _, turns in items]
    done: list[list[str]] = [[] for _ in items]  # the methods that changed it
    for number in range(rounds):
        methods = [random.Random(f"{seed}:{number}:{record.where}").choice(list(METHODS)) for record, _ in items]
        asked = [
            ask(
                f"{METHODS[method]}\n\n{_LABEL}\n{text}",
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed * 1_000_003 + number,
            )
            for method, text in zip(methods, current, strict=True)
        ]
        texts = [_rewritten(reply, text) for reply, text in zip(generator(asked), current, strict=True)]
        tried = [i for i, text in enumerate(texts) if text]
        verdicts = generator([_equal(current[i], texts[i]) for i in tried])
        for i, verdict in zip(tried, verdicts, strict=True):
            if verdict.text.strip().lower().startswith(("no", "different")):
                current[i] = texts[i]
                done[i].append(methods[i])
    evolved = [i for i, methods in enumerate(done) if methods]
    requests = [
        Request(tuple((turn.role, turn.text) for turn in (*items[i][1][:-1], Turn("user", current[i]))), max_new_tokens)
        for i in evolved
    ]
    replies = dict(zip(evolved, generator(requests), strict=True))
    found: list[Outcome] = []
    for i, (record, turns) in enumerate(items):
        if i not in replies:
            found.append(Dropped("no rewriting added anything"))
            continue
        outcome = answers.fault(replies[i]) or _no_answer(replies[i])
        about = origin("evol_instruct", generator.name, [record.where], seed, steps=done[i])
        question = (*turns[:-1], Turn("user", current[i]))
        found.append(outcome or answers.answered(record, question, replies[i].text.strip(), about))
    return found


def _rewritten(reply: Reply, before: str) -> str:
    """Return the new instruction, "" if the reply is none."""
    text = reply.text.strip()
    if answers.fault(reply) or _REPEATED.search(text) or text == before or not re.search(r"\w", text):
        return ""
    return text


def _equal(one: str, two: str) -> Request:
    return ask(
        "Do these two instructions ask for the same, with the same constraints, and the same depth and breadth? "
        f"Reply with Yes or No.\n\nFirst: {one}\n\nSecond: {two}",
        max_new_tokens=8,
    )


def _no_answer(reply: Reply) -> Dropped | None:
    words = reply.text.lower().split()
    if len(words) < 80 and re.search(r"\bsorry\b", reply.text, re.IGNORECASE):
        return Dropped("the answer is an apology")
    return None if re.search(r"\w", reply.text) else Dropped("the answer has no words")
