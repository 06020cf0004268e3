"""Scores of a model on held-out examples: loss, metrics of what it generates, benchmarks."""

from jax_it.evaluation.evaluators import Stopped
from jax_it.evaluation.results import examples_text, failures, table, write, write_missing_events
from jax_it.evaluation.suite import Suite, training_suite

__all__ = [
    "Stopped", "Suite", "examples_text", "failures", "table", "training_suite", "write", "write_missing_events",
]  # fmt: skip
