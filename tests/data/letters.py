"""A tokenizer of single letters, small enough to be checked by eye, and the files and sources of a few records."""

import hashlib
import json
import string
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from jax_it.data.tokenized import Counts, Tokenized

KNOWN = string.ascii_lowercase + string.digits + " "
PAD, END, UNKNOWN, FIRST = 0, 1, 2, 3


class Letters:
    """As `jax_it.data.tokenizer.Tokenizer`: a token a letter, and capitals are unknown."""

    pad, end, unknown, size = PAD, END, UNKNOWN, FIRST + len(KNOWN)
    start: int | None = None
    chat_template: str | None = None

    def __init__(self, name: str = "letters"):
        self.name = name
        self.encoded = 0  # texts so far

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.encoded += len(texts)
        return [ids(text) for text in texts]

    def lost(self, characters: Set[str]) -> set[str]:
        return {"\n"} & characters

    def unknown_of(self, characters: Set[str]) -> set[str]:
        return characters - set(KNOWN)

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(KNOWN[token - FIRST] for token in tokens if token >= FIRST)

    text = decode

    def show(self, tokens: Iterable[int]) -> list[str]:
        return [("<pad>", "</s>", "<unk>", *KNOWN)[token] for token in tokens]

    def digest(self) -> str:
        return hashlib.blake2b(self.name.encode(), digest_size=16).hexdigest()


def ids(text: str) -> list[int]:
    return [FIRST + KNOWN.index(letter) if letter in KNOWN else UNKNOWN for letter in text]


def write(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """Writes the records as JSON lines and returns the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(*texts: str) -> list[dict[str, Any]]:
    """Records from texts such as "prompt>completion"."""
    return [dict(zip(("prompt", "completion"), text.split(">"), strict=True)) for text in texts]


def made(name: str, examples: Sequence[tuple[Sequence[int], Sequence[int]]], template: str = "auto") -> Tokenized:
    """A tokenized source of these (source, target) tokens, without a file; ([], []) is one that was dropped."""
    sides = [[np.asarray(pair[side], np.int32) for pair in examples] for side in (0, 1)]
    tokens = [np.concatenate([np.zeros(0, np.int32), *side]) for side in sides]
    ends = [np.cumsum([0, *map(len, side)]) for side in sides]
    records = np.arange(len(examples))
    return Tokenized(name, template, Counts(examples=len(examples)), tokens[0], ends[0], tokens[1], ends[1], records)


def of_lengths(name: str, sources: Sequence[int], targets: Sequence[int], first: int = FIRST) -> Tokenized:
    """A tokenized source of examples of these lengths (0: dropped), each with tokens that no other example has."""
    examples = []
    for source, target in zip(sources, targets, strict=True):
        if not target:
            examples.append(([], []))
            continue
        tokens = list(range(first, first + source + target - 2))
        first += len(tokens)
        examples.append(([*tokens[: source - 1], END], [*tokens[source - 1 :], END]))
    return made(name, examples)
