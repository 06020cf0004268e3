"""Scores of a model on held-out examples: loss, and metrics over what it generates."""

from jax_it.evaluation.evaluator import Evaluator, Needed, Scored, Stopped, read, within_training
from jax_it.evaluation.results import complete, examples_text, failures, table, write

__all__ = [
    "Evaluator",
    "Needed",
    "Scored",
    "Stopped",
    "complete",
    "examples_text",
    "failures",
    "read",
    "table",
    "within_training",
    "write",
]
