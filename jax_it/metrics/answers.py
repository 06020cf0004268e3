"""Short answers, right or wrong: exact matches, SQuAD's F1, the final number of a calculation. From 0 to 100.

Of several references the best counts.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

from jax_it.metrics.languages import spaced
from jax_it.metrics.metric import Metric, best_of

# A minus counts where it joins no two things (not in 3-5), and a comma where it groups thousands (or lakhs).
_NUMBER = re.compile(
    r"(?:(?<![\dA-Za-z)\]])([-−]))?(?:\$([-−])?)?"
    r"(\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\dA-Za-z.])\.\d+)"
)


def exact_match() -> Metric:
    """Return the share of predictions that equal a reference, but for white space at the ends. Case counts."""
    return best_of(lambda prediction, text: float(prediction.strip() == text.strip()))


def squad_exact_match(of_characters: bool = False) -> Metric:
    """Return the share of predictions with the same words as a reference, in order (Rajpurkar et al. 2016, SQuAD)."""
    words = character_words if of_characters else english_words
    return best_of(lambda prediction, text: float(words(prediction) == words(text)))


def squad_f1(of_characters: bool = False) -> Metric:
    """Return the F1 of the words, as multisets, that a prediction shares with a reference (SQuAD's evaluation).

    Where no word is left of both texts the F1 is 1, of one of them 0 (as in SQuAD 2.0).
    """
    words = character_words if of_characters else english_words
    return best_of(lambda prediction, text: _f1(words, prediction, text))


def english_words(text: str) -> list[str]:
    """Return SQuAD's words: between white space, in lower case, without ASCII punctuation and English articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def character_words(text: str) -> list[str]:
    """Return MLQA's words (Lewis et al. 2020): each character of the scripts of `languages.spaced` is one.

    Lower case, without punctuation of any script; no articles are left out.
    """
    kept = (c for c in unicodedata.normalize("NFKC", text).lower() if not _is_punctuation(c))
    return spaced("".join(kept)).split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


def _f1(words: Callable[[str], list[str]], prediction: str, reference: str) -> float:
    predicted, expected = Counter(words(prediction)), Counter(words(reference))
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * (predicted & expected).total() / (predicted.total() + expected.total())


def final_number() -> Metric:
    """Return the share of predictions whose final number equals a reference's (GSM8K's exact match, Cobbe et al. 2021).

    The final number is the first one after the last "####", or else the last of the text. Numbers are
    compared as exact decimals: 1,234.50 equals $1234.5, and 20% equals 20. Where either text has none, they differ.
    """

    def equal(prediction: str, reference: str) -> float:
        number = find_final_number(prediction)
        return float(number is not None and number == find_final_number(reference))

    return best_of(equal)


def find_final_number(text: str) -> Decimal | None:
    """Return the first number after the last "####", or else the last number of the text; None where there is none."""
    _, mark, end = text.rpartition("####")
    if mark and (numbers := _numbers(end)):
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(("-" if before or after else "") + digits.replace(",", ""))
        for before, after, digits in _NUMBER.findall(text)
    ]
