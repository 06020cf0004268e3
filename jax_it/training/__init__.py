"""Training: optimizer, state, step, and the loop that reads from top to bottom."""

from jax_it.training.dry_run import dry_run
from jax_it.training.loop import train

__all__ = ["dry_run", "train"]
