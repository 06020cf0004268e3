"""Plans: a run's real step, compiled for hardware that you don't have."""

from jax_it.plan import serve
from jax_it.plan.plan import Plan, plan
from jax_it.plan.text import text, to_json
from jax_it.plan.topology import Topology, find

__all__ = ["Plan", "Topology", "find", "plan", "serve", "text", "to_json"]
