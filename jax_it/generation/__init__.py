"""Text from a model: functions over (prefill, step, cache)."""

from jax_it.generation.decode import Generator
from jax_it.generation.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Generator", "Sampling"]
