"""Text generation with a key-value cache.

To learn how it works, read `greedy.py`, which decodes one prompt; `slots.py`, which decodes many, each in a slot; and
`scheduler.py`, which decides which request gets which slot. `generate` decodes a list of prompts.

Each layer calls the one below it, so `insert`, `grow` and `decode_step` exist in several:

    Scheduler        which requests, which slots, how many steps           on the host
    Engine           calls the compiled programs; holds weights and state  on the host
    slots.py         what the programs compute, for all slots              compiled
    Model            prefill and decode_step of a batch of rows            compiled
    family's module  the same in the module's own weights: `CausalLM`, `EncoderDecoder`
    kv_cache.py      insert, grow, take_rows: the cache's arrays alone

A server's requests have settings of their own (`requests.py`, applied in `sampling.py`); its long prompts are prefilled
in parts (`chunked_prefill.py`), and prompts that begin alike share what is computed (`prefix_cache.py`).
"""

from jax_it.generation.engine import Engine
from jax_it.generation.greedy import greedy
from jax_it.generation.requests import GREEDY, Constraint, Request, RequestOutput, Sampling
from jax_it.generation.scheduler import Scheduler, generate
from jax_it.generation.stop import StopStrings

__all__ = [
    "GREEDY", "Constraint", "Engine", "Request", "RequestOutput", "Sampling", "Scheduler", "StopStrings", "generate",
    "greedy",
]  # fmt: skip
