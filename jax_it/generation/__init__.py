"""Text from a model: functions over (prefill, step, cache)."""

from jax_it.generation.decode import Generator, Text
from jax_it.generation.sampling import GREEDY, Sampling
from jax_it.generation.stop import StopStrings

__all__ = ["GREEDY", "Generator", "Sampling", "StopStrings", "Text"]
