"""Scores of a model on held-out examples: loss, and metrics over what it generates."""

from jax_it.evaluation.evaluator import Evaluator, Scored, Stopped
from jax_it.evaluation.results import complete, examples_text, failures, table, write

__all__ = ["Evaluator", "Scored", "Stopped", "complete", "examples_text", "failures", "table", "write"]
