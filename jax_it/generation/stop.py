"""Strings that end a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopStrings:
    """Ends a text where the first of some strings comes, and cuts it there: `stop` of a `Generator`.

    Tokens say little of where a string begins, so texts are decoded, every few steps; what a text has beyond the
    string is cut from it.
    """

    strings: Sequence[str]
    decode: Callable[[Sequence[int]], str]

    def __call__(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        places = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(places)] if places else text
