"""Token ids of a text that is still growing to text: only what no later token changes."""

from collections.abc import Callable, Container, Sequence

from jax_it.generation import StopStrings

# What `clean_up_tokenization` of Transformers' tokenizers removes the space of, once all of it is there.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Detokenizer:
    """Decode one text bit by bit; the parts together are what decoding all of its tokens at once gives.

    Held back are the first bytes of a character, the beginning of a stop string, and, where the tokenizer removes
    spaces before punctuation, a space that may go. So are `byte_tokens` at the end, such as Llama 2's `<0x0A>`: one
    byte that is wrong makes all of those before it wrong.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        cleans_up: bool = False,
        byte_tokens: Container[int] = (),
    ):
        self._decode, self._byte_tokens = decode, byte_tokens
        self._stop = StopStrings(stop, decode) if stop else None
        self._cleans_up = cleans_up
        self.text = ""  # shown so far

    def add(self, tokens: Sequence[int], is_last: bool) -> str:
        """Return what is new of the text of all tokens so far; it may be empty."""
        number = len(tokens)
        while number and not is_last and tokens[number - 1] in self._byte_tokens:
            number -= 1
        text = self._decode(tokens[:number])
        if self._stop:
            text = self._stop.cut(text)
        if not is_last:
            text = self._settled(text)
        new = text[len(self.text) :]
        self.text += new
        return new

    def _settled(self, text: str) -> str:
        text = text.rstrip("\ufffd")
        held = 0
        if self._stop:
            held = max(overlap(text, string) for string in self._stop.strings)
        if self._cleans_up:
            held = max(held, *(overlap(text, pattern) for pattern in _CLEANED))
        return text[: len(text) - held]


def overlap(text: str, string: str) -> int:
    """Return how many of the string's first characters the text ends with, short of all of them."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
