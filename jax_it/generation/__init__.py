"""Text generation with a key-value cache.

To learn how it works, read `greedy.py`, which decodes one prompt; `slots.py`, which decodes many, each in a slot; and
`scheduler.py`, which decides which request gets which slot. `engine.py` compiles the functions of `slots.py`, and
`generate` decodes a list of prompts.
"""

from jax_it.generation.engine import Engine
from jax_it.generation.greedy import greedy
from jax_it.generation.requests import Request, RequestOutput
from jax_it.generation.sampling import GREEDY, Sampling
from jax_it.generation.scheduler import Scheduler, generate
from jax_it.generation.stop import StopStrings

__all__ = [
    "GREEDY", "Engine", "Request", "RequestOutput", "Sampling", "Scheduler", "StopStrings", "generate", "greedy"
]  # fmt: skip
