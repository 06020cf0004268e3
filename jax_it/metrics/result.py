"""What every evaluation returns."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Result(NamedTuple):
    """What an evaluation found. Scores, intervals and errors are by group of examples, and then by metric.

    The groups of a task are called "TASK" (all of its examples) and "TASK/GROUP".
    """

    metrics: dict[str, dict[str, float]]
    predictions: list[dict[str, Any]]  # id, task, prompt, prediction, references
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType({})  # 95 %
    errors: Mapping[str, Mapping[str, str]] = MappingProxyType({})  # why metrics have no value, one line each
    advice: str = ""  # what to know about the scores, one line each

    def merge(self, other: "Result") -> "Result":
        """Return the results of this evaluation and of another one."""
        return Result(
            {**self.metrics, **other.metrics},
            [*self.predictions, *other.predictions],
            {**self.intervals, **other.intervals},
            {**self.errors, **other.errors},
            "\n".join(dict.fromkeys(filter(None, (self.advice, other.advice)))),
        )
