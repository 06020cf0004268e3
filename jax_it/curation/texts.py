"""Texts as they are compared: folded, in words."""

import re
import unicodedata
from collections.abc import Iterator

from jax_it.curation.input import Input
from jax_it.curation.settings import Part
from jax_it.data import templates
from jax_it.data.records import InvalidRecord
from jax_it.data.templates import Example

# Thai, Lao, Burmese, Khmer, kana and Chinese characters: scripts without spaces, whose characters count as words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORDS = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def part_of(example: Example, part: Part) -> str:
    """Return the prompt, the completion, or both."""
    if part == "both":
        return f"{example.prompt}\n\n{example.completion}"
    return example.prompt if part == "prompt" else example.completion


def of_records(input: Input, part: Part) -> Iterator[str]:
    """Yield the part's text of every record, "" of those that cannot be rendered."""
    for chunk in input.chunks():
        for record in chunk.records():
            try:
                yield part_of(templates.render(record, chunk.template), part)
            except InvalidRecord:
                yield ""


def fold(text: str) -> str:
    """Return a text in NFKC without differences of case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(folded: str) -> list[str]:
    """Return the words of a folded text, without punctuation; of scripts without spaces, the characters."""
    return _WORDS.findall(folded)
