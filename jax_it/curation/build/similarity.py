"""Find the most similar of many texts by ROUGE-L: the F-measure of `metrics`' rougeL_chars, faster.

For text in Latin letters without accents it is rouge-score's rougeL without stemming, which Self-Instruct uses.
"""

from array import array
from collections import Counter

import numpy as np

from jax_it.curation.stage import require
from jax_it.metrics import characters


class Similar:
    """Texts that are added one by one, and searched for one that is more similar than a threshold.

    The common subsequence of two texts is no longer than the number of words that they share, each as often as both
    have it. An index from words to texts gives that number, and few texts are compared in full.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._common_length = require("rapidfuzz.distance", "--method self_instruct").LCSseq.similarity
        self._ids: dict[tuple[str, int], int] = {}  # of the first "the" in a text, of the second, …
        self._holding: list[array[int]] = []  # for each of these, the texts that have it
        self._texts: list[list[str]] = []
        self._lengths = array("i")

    def add(self, text: str) -> None:
        words = characters(text)
        for key in _numbered(words):
            number = self._ids.setdefault(key, len(self._ids))
            if number == len(self._holding):
                self._holding.append(array("i"))
            self._holding[number].append(len(self._texts))
        self._texts.append(words)
        self._lengths.append(len(words))

    def find(self, text: str) -> tuple[int, float] | None:
        """Return the number, from 0, of the most similar text above the threshold and its F-measure, or None."""
        words = characters(text)
        known = [self._ids[key] for key in _numbered(words) if key in self._ids]
        if not known:
            return None
        shared = np.bincount(np.concatenate([np.array(self._holding[number]) for number in known]))
        totals = len(words) + np.array(self._lengths)[: len(shared)]
        best: tuple[int, float] | None = None
        for number in np.flatnonzero(2 * shared > self._threshold * totals).tolist():
            score = 2 * self._common_length(words, self._texts[number]) / int(totals[number])
            if score > (best[1] if best else self._threshold):
                best = number, score
        return best


def _numbered(words: list[str]) -> list[tuple[str, int]]:
    """Return each word with how often it came before."""
    seen: Counter[str] = Counter()
    found = []
    for word in words:
        found.append((word, seen[word]))
        seen[word] += 1
    return found
