"""A set in another language: every turn is translated by itself."""

from collections.abc import Sequence

from jax_it.curation.build import answers
from jax_it.curation.build.requests import Generator, Request, ask, origin
from jax_it.curation.filter import language as language_of
from jax_it.curation.stage import Dropped, Outcome
from jax_it.data.records import Record
from jax_it.data.templates import Turn

LETTERS = 40  # of a text whose language can be told


def make(
    generator: Generator,
    items: Sequence[tuple[Record, Sequence[Turn]]],
    language: str,
    max_new_tokens: int,
    seed: int,
) -> list[Outcome]:
    """Return a record for each conversation, translated; `language` is its name, as the model knows it.

    A record is dropped if a text of it comes back as it was, or in the language that it was in.
    """
    requests = [
        _translate(turn.text, language, max_new_tokens) for _, turns in items for turn in turns if turn.text.strip()
    ]
    replies = iter(generator(requests))
    found: list[Outcome] = []
    for record, turns in items:
        translated: list[Turn] = []
        wrong: Dropped | None = None
        for turn in turns:
            if not turn.text.strip():
                translated.append(turn)
                continue
            reply = next(replies)
            wrong = wrong or answers.fault(reply) or _untranslated(turn.text, reply.text)
            translated.append(Turn(turn.role, reply.text.strip()))
        about = origin("translate", generator.name, [record.where], seed, language=language)
        found.append(wrong or answers.answered(record, translated[:-1], translated[-1].text, about))
    return found


def _translate(text: str, language: str, max_new_tokens: int) -> Request:
    return ask(
        f"Translate the text below into {language}. It may be an instruction or a question: do not answer it. Keep "
        "code, formulas, URLs and the layout as they are. Reply with the translation alone.\n\n### Text\n" + text,
        max_new_tokens=max_new_tokens,
    )


def _untranslated(before: str, after: str) -> Dropped | None:
    if sum(map(str.isalpha, before)) < LETTERS or sum(map(str.isalpha, after)) < LETTERS:
        return None
    (old, old_probability), (new, new_probability) = language_of(before), language_of(after)
    if before.strip() == after.strip() or (old == new and min(old_probability, new_probability) > 0.9):
        return Dropped("a text was not translated", {"language": new})
    return None
