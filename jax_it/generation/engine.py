"""Compiled programs that decode many prompts at a time on the devices: `slots.py` has the functions they compute."""

import copy
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_it import sharding
from jax_it.generation import slots
from jax_it.generation.beam_search import BeamSearch
from jax_it.generation.requests import GREEDY, DecodeResult, PrefillBatch, Sampling, check
from jax_it.generation.sampling import Sampler
from jax_it.generation.slots import Strategy
from jax_it.models import Model, Params


class Engine:
    """The compiled programs of one model and one decoding strategy; `load` gives an engine with weights and slots.

    It has `batch_size` slots or a few more: every device has as many, and at least those of one request. A text ends at
    one of the model's end tokens or of `eos_ids`, or at its limit. `shapes` are compiled: (program, slots, width).
    Raises ValueError where no text would ever end, and UserError as `sampling.check` does.
    """

    def __init__(
        self,
        model: Model,
        mesh: jax.sharding.Mesh,
        max_new_tokens: int,
        batch_size: int,
        sampling: Sampling = GREEDY,
        eos_ids: Collection[int] = (),
        log_probs: bool = False,
    ):
        check(sampling, max_new_tokens, model.config.vocab_size)
        self.eos_ids = tuple(dict.fromkeys([*model.config.eos_token_ids, *eos_ids]))
        if not self.eos_ids:
            raise ValueError("no end token: texts would never end")
        beams = sampling.num_beams > 1
        if beams and sampling.num_samples > sampling.num_beams:
            raise ValueError(f"{sampling.num_samples} texts of a prompt, from {sampling.num_beams} beams")
        strategy: Strategy = (BeamSearch if beams else Sampler)(sampling, self.eos_ids, max_new_tokens, log_probs)
        self.max_new_tokens, self.log_probs, self.num_beams = max_new_tokens, log_probs, strategy.num_beams
        self.slots_per_request = 1 if beams else sampling.num_samples
        self.shards = sharding.batch_parts(mesh)  # the numbers of slots and of prompts are multiples of it
        self.num_slots = sharding.round_up_to_shards(max(batch_size, self.slots_per_request * self.shards), mesh)
        self.shapes: set[tuple[str, int, int]] = set()
        self._mesh = mesh
        self._params: Params = {}
        self._weights: Any = None  # prepared for decoding
        self._state: Any = None
        self._capacity = 0

        # Prefilling and inserting are one program: two would be twice as many to compile.
        def prefill_and_insert(params: Params, state: slots.SlotState, batch: PrefillBatch) -> slots.SlotState:
            return slots.insert(strategy, state, slots.prefill(model, strategy, params, batch), batch)

        self._prepare = jax.jit(model.prepare_for_decoding)
        self._programs = {
            "init": jax.jit(partial(slots.init_slots, model, strategy), static_argnums=(1, 2)),
            "grow": jax.jit(slots.grow, static_argnums=1),
            "insert": jax.jit(prefill_and_insert, donate_argnums=1),
            "decode": jax.jit(
                partial(slots.decode, model, strategy),
                donate_argnums=1,
                out_shardings=(None, sharding.replicated(mesh)),
            ),
            "resize": jax.jit(partial(slots.resize, strategy)),
        }

    def load(self, params: Params) -> "Engine":
        """Return an engine with these weights and empty slots, which shares the programs compiled so far."""
        loaded = copy.copy(self)
        loaded._params, loaded._weights, loaded._state, loaded._capacity = params, None, None, 0
        return loaded

    @property
    def prefill_widths(self) -> set[int]:
        """Return the widths of prompts for which `insert` is compiled."""
        return {width for program, _, width in self.shapes if program == "insert"}

    def reserve(self, capacity: int) -> None:
        """Make the cache hold prompts of `capacity` tokens, if it does not yet."""
        if self._state is None:
            self._capacity = capacity
            with jax.set_mesh(self._mesh):
                self._weights = self._prepare(self._params)
            self._state = self._run("init", self.num_slots, capacity, self._params, self.num_slots, capacity)
        elif capacity > self._capacity:
            by, self._capacity = capacity - self._capacity, capacity
            self._state = self._run("grow", len(self._state.done_B), capacity, self._state, by)

    def insert(self, batch: PrefillBatch) -> None:
        """Prefill prompts, for which there is capacity, and start their texts in their slots."""
        tokens_QS, segments_QS = sharding.place((batch.tokens_QS, batch.segments_QS), self._mesh)
        placed = batch._replace(tokens_QS=tokens_QS, segments_QS=segments_QS)
        width = batch.tokens_QS.shape[1]
        self._state = self._run("insert", len(self._state.done_B), width, self._params, self._state, placed)

    def decode(self, idle: Sequence[bool], max_steps: int, until_done: int) -> DecodeResult:
        """Decode up to `max_steps` tokens in every slot that is not idle; stop once `until_done` slots are done.

        Idle slots count as done. All steps run on the devices, and the texts then come to the host together.
        """
        arguments = self._weights, self._state, np.array(idle), np.int32(max_steps), np.int32(until_done)
        self._state, result = self._run("decode", len(idle), self._capacity, *arguments)
        return DecodeResult(*map(np.asarray, result))

    def resize(self, order: Sequence[int]) -> None:
        """Replace the slots by those in `order`. One that is named again must be idle from now on."""
        self._state = self._run("resize", len(order), self._capacity, self._state, np.array(order, np.int32))

    def _run(self, program: str, num_slots: int, width: int, *arguments: Any) -> Any:
        self.shapes.add((program, num_slots, width))
        with jax.set_mesh(self._mesh):
            return self._programs[program](*arguments)
