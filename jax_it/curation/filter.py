"""Rules that keep or drop a record by its texts: length, language, patterns, personal data, unsafe words."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files as package_files
from typing import Any

import regex

from jax_it.curation import personal_data
from jax_it.data.records import Fields
from jax_it.data.templates import Example
from jax_it.errors import UserError, shown
from jax_it.metrics import characters

SECONDS = 1.0  # of a pattern on one text


def text_of(example: Example, on: str) -> str:
    """Return what a rule looks at: the "prompt", the "completion" or "both"."""
    if on == "both":
        return f"{example.prompt}\n\n{example.completion}"
    return example.prompt if on == "prompt" else example.completion


LENGTHS: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(characters(text))}


def compile_pattern(pattern: str, option: str) -> Any:
    """Return a compiled regular expression. Raises UserError that names the option."""
    try:
        return regex.compile(pattern)
    except (regex.error, re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{option}: {shown(pattern)} is not a regular expression: {error}") from None


def matches(pattern: Any, text: str, where: str) -> bool:
    """Return whether the pattern is in the text. Raises UserError, with the record's place, if that takes too long."""
    try:
        return pattern.search(text, timeout=SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"{where}: the pattern {shown(pattern.pattern)} takes more than {SECONDS:g} s on this text; simplify it"
        ) from None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)


def language(text: str) -> tuple[str, float]:
    """Return the code (ISO 639-1) of the text's likeliest language, and its probability."""
    code, probability = _identifier().classify(text)
    return code, float(probability)


@lru_cache(maxsize=4)
def unsafe_words(file: str = "") -> Any:
    """Return the pattern of a word list, one word or phrase a line; without a file, of the list that comes with jax_it.

    Raises UserError for a file that cannot be read, and for one without words.
    """
    from jax_it.data import sources

    if file:
        text = sources.read_text(file, "--unsafe-words")
    else:
        text = (package_files("jax_it.curation") / "unsafe_words.txt").read_text(encoding="utf-8")
    words = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not words:
        raise UserError(f"--unsafe-words: {file} has no words; write one on each line")
    return regex.compile(r"\b(?:\L<words>)\b", regex.IGNORECASE, words=sorted(set(words)))


def map_texts(value: Any, function: Callable[[str], str]) -> Any:
    """Return a record with the function applied to every text in it, those within lists and objects too."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_texts(item, function) for name, item in value.items()}
    return [map_texts(item, function) for item in value] if isinstance(value, list | tuple) else value


def redact(fields: Fields, kinds: Sequence[str], region: str, words: Any | None) -> tuple[Fields, tuple[str, ...]]:
    """Return a record with personal data and unsafe words replaced, and the kinds of what was replaced.

    `words` is the pattern of `unsafe_words`; None leaves them.
    """
    seen: dict[str, None] = {}

    def change(text: str) -> str:
        found = personal_data.find(text, tuple(kinds), region)
        seen.update(dict.fromkeys(one.kind for one in found))
        text = personal_data.redact(text, found)
        if words is not None:
            text, number = words.subn("[UNSAFE]", text)
            seen.update({"unsafe": None} if number else {})
        return text

    return map_texts(fields, change), tuple(seen)
