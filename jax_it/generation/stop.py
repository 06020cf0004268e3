"""Strings that end a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopStrings:
    """End a text at the first of some strings: the `stop` of a `Request`.

    Strings may begin in the middle of a token, so the scheduler has texts decoded every few steps; `cut` removes what
    a text has from the string on.
    """

    strings: Sequence[str]
    decode: Callable[[Sequence[int]], str]

    def __call__(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """Return the text before the first of the strings."""
        places = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(places)] if places else text
