"""A metric is a few numbers for each example, and a value from their sums over any of the examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Predictions = Sequence[str]
References = Sequence[Sequence[str]]  # of each prediction, one or more
Array = NDArray[np.float64]
# (sums [samples, numbers], how many examples each sum is over) -> the metric of each sample [samples]
Values = Callable[[Array, int], Array]


@dataclass(frozen=True)
class Metric:
    """A mean over examples has one number for each example; BLEU has its counts of n-grams and lengths.

    Because only sums count, a bootstrap draws rows of numbers and never reads the texts again.
    """

    statistics: Callable[[Predictions, References], Array]  # [examples, numbers]
    values: Values
    lower_is_better: bool = False
    check: Callable[[], None] = lambda: None  # raises UserError if a package or file that the metric needs is missing

    def __call__(self, predictions: Predictions, references: References) -> float:
        return value(self.values, self.statistics(predictions, references))


def value(values: Values, rows: Array) -> float:
    """Compute a metric over all examples from their `rows` of numbers [examples, numbers]."""
    sums = np.array([[math.fsum(column) for column in rows.T]])  # exact, so the order of the examples does not matter
    return float(values(sums, len(rows))[0])


def mean(sums: Array, examples: int) -> Array:
    """Compute the mean over examples, on any scale."""
    return sums[:, 0] / examples


def percent(sums: Array, examples: int) -> Array:
    """Compute the mean over examples of scores from 0 to 1, as a number from 0 to 100."""
    return 100 * (sums[:, 0] / examples)


def perplexity(loss: float) -> float:
    """Compute the perplexity of a loss in nats per token; inf if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else loss


def best_of(score: Callable[[str, str], float]) -> Metric:
    """Return the mean over examples of a score from 0 to 1 of (prediction, reference), for the best reference."""

    def statistics(predictions: Predictions, references: References) -> Array:
        examples = zip(predictions, references, strict=True)
        return np.array([[max(score(text, reference) for reference in several)] for text, several in examples], float)

    return Metric(statistics, percent)
