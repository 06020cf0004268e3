"""Decodes many prompts at a time on the devices, each in a slot of its own: prefill, insert, decode_step.

The functions here are pure and compiled once for each number of slots and width of prompts; `Engine` compiles them and
holds what they pass on. `scheduler.py` decides what to insert, and when. Dimension letters beside those of
models/config.py: B slots, P prompts that are prefilled together, R slots that these get, N texts of a slot.
"""

import copy
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.generation.beam_search import BeamSearch
from jax_it.generation.requests import DecodeResult, PrefillBatch
from jax_it.generation.sampling import GREEDY, Sampling, SamplingSearch, check
from jax_it.models import DecodingWeights, Model, Params, kv_cache

Search = SamplingSearch | BeamSearch


class SlotState(NamedTuple):
    """The requests under way, each with one row of the cache, or one for each of its beams.

    A slot whose request is done, or that never had one, stays as it is.
    """

    cache: kv_cache.KVCache
    last_B: jax.Array  # the token that the next step takes, one for each row of the cache
    start_B: jax.Array  # that token's position at the first step, one for each slot
    number_B: jax.Array  # new tokens so far, the end token among them
    limit_B: jax.Array  # new tokens at most
    done_B: jax.Array
    texts: Any  # the search's state


class Engine:
    """Compiled programs for one model and one way of choosing tokens; `load` gives an engine with weights and slots.

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
        search: Search = (BeamSearch if beams else SamplingSearch)(sampling, self.eos_ids, max_new_tokens, log_probs)
        self.max_new_tokens, self.log_probs, self.num_beams = max_new_tokens, log_probs, search.num_beams
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
        def prefill_and_insert(params: Params, state: SlotState, batch: PrefillBatch) -> SlotState:
            return insert(search, state, prefill(model, search, params, batch), batch)

        self._prepare = jax.jit(model.prepare_for_decoding)
        self._programs = {
            "init": jax.jit(partial(init_slots, model, search), static_argnums=(1, 2)),
            "grow": jax.jit(grow, static_argnums=1),
            "insert": jax.jit(prefill_and_insert, donate_argnums=1),
            "decode": jax.jit(
                partial(decode, model, search), donate_argnums=1, out_shardings=(None, sharding.replicated(mesh))
            ),
            "resize": jax.jit(partial(resize, search)),
        }

    def load(self, params: Params) -> "Engine":
        """Returns an engine with these weights and empty slots, which shares the programs compiled so far."""
        loaded = copy.copy(self)
        loaded._params, loaded._weights, loaded._state, loaded._capacity = params, None, None, 0
        return loaded

    @property
    def prefill_widths(self) -> set[int]:
        """Returns the widths of prompts for which `insert` is compiled."""
        return {width for program, _, width in self.shapes if program == "insert"}

    def reserve(self, capacity: int) -> None:
        """Makes the cache hold prompts of `capacity` tokens, if it does not yet."""
        if self._state is None:
            self._capacity = capacity
            with jax.set_mesh(self._mesh):
                self._weights = self._prepare(self._params)
            self._state = self._run("init", self.num_slots, capacity, self._params, self.num_slots, capacity)
        elif capacity > self._capacity:
            by, self._capacity = capacity - self._capacity, capacity
            self._state = self._run("grow", len(self._state.done_B), capacity, self._state, by)

    def insert(self, batch: PrefillBatch) -> None:
        """Prefills prompts, for which there is capacity, and starts their texts in their slots."""
        tokens_PS, segments_PS = sharding.place((batch.tokens_PS, batch.segments_PS), self._mesh)
        placed = batch._replace(tokens_PS=tokens_PS, segments_PS=segments_PS)
        width = batch.tokens_PS.shape[1]
        self._state = self._run("insert", len(self._state.done_B), width, self._params, self._state, placed)

    def decode(self, idle: Sequence[bool], max_steps: int, until_done: int) -> DecodeResult:
        """Decodes up to `max_steps` tokens in every slot that is not idle; stops once `until_done` slots are done.

        Idle slots count as done. All steps run on the devices, and the texts then come to the host together.
        """
        arguments = self._weights, self._state, np.array(idle), np.int32(max_steps), np.int32(until_done)
        self._state, result = self._run("decode", len(idle), self._capacity, *arguments)
        return DecodeResult(*map(np.asarray, result))

    def resize(self, slots: Sequence[int]) -> None:
        """Replaces the slots by some of them, in this order. One that is named again must be idle from now on."""
        self._state = self._run("resize", len(slots), self._capacity, self._state, np.array(slots, np.int32))

    def _run(self, program: str, slots: int, width: int, *arguments: Any) -> Any:
        self.shapes.add((program, slots, width))
        with jax.set_mesh(self._mesh):
            return self._programs[program](*arguments)


def init_slots(model: Model, search: Search, params: Params, slots: int, capacity: int) -> SlotState:
    """Returns slots that are all done, for prompts of at most `capacity` tokens.

    To be compiled: outside of jit, equal arrays may be one, which cannot be donated twice.
    """
    ints_BS, ints_B = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((slots, capacity), (slots,)))
    batch = PrefillBatch(ints_BS, ints_BS, ints_B, ints_B, ints_B, ints_B)
    shapes = jax.eval_shape(partial(prefill, model, search), params, batch)

    def zeros(copies: int) -> Any:
        return lambda axes, leaf: jnp.zeros(
            [size * copies if axis == "B" else size for axis, size in zip(axes, leaf.shape, strict=True)], leaf.dtype
        )

    cache = kv_cache.map_axes(zeros(search.num_beams), shapes.cache, of_source=zeros(1))
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tuple(shapes[1:]))
    return _sharded(SlotState(cache, *rest)._replace(done_B=jnp.ones(slots, bool)))


def prefill(model: Model, search: Search, params: Params, batch: PrefillBatch) -> SlotState:
    """Returns texts with no token yet: the cache of the P prompts, and everything else for the R slots."""
    first_P, start_P, cache = model.prefill(params, batch.tokens_PS, batch.segments_PS, search.max_new_tokens)
    first_R, start_R = first_P[batch.prompts_R], start_P[batch.prompts_R]
    seen_RV = None
    if search.sampling.repetition_penalty != 1:
        seen_RV = _seen(model, batch, first_P)[batch.prompts_R]
    none_R = jnp.zeros_like(start_R)
    last_R = jnp.repeat(first_R, search.num_beams)
    texts = search.begin(first_R, batch.text_ids_R, seen_RV)
    return SlotState(cache, last_R, start_R, none_R, batch.limits_R, none_R > 0, texts)


def insert(search: Search, state: SlotState, new: SlotState, batch: PrefillBatch) -> SlotState:
    """Returns the slots with prefilled texts in those of the batch."""

    def put(slots: Any, old: Any, new: Any) -> Any:
        return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), old, new)

    cache = kv_cache.grow(new.cache, state.cache.prompt_capacity - new.cache.prompt_capacity)
    cache = kv_cache.insert(state.cache, cache, batch.slots_R, batch.prompts_R, search.num_beams)
    last_B = put(kv_cache.rows_of(batch.slots_R, search.num_beams), state.last_B, new.last_B)
    return _sharded(SlotState(cache, last_B, *put(batch.slots_R, tuple(state[2:]), tuple(new[2:]))))


def decode_step(model: Model, search: Search, weights: DecodingWeights, state: SlotState) -> SlotState:
    """Returns the slots after one more token in each that is not done."""
    positions_B = jnp.repeat(state.start_B + state.number_B, search.num_beams)
    logits_BV, cache = model.decode_step(weights, state.last_B, positions_B, state.cache)
    texts, last_B, rows_B, ended_B = search.advance(state.texts, logits_BV, state.number_B, state.limit_B, state.done_B)
    if rows_B is not None:
        cache = kv_cache.take_rows(cache, rows_B)
    # The number of a slot that is done stays; what it still writes to its own rows of the cache is never read.
    number_B = jnp.where(state.done_B, state.number_B, state.number_B + 1)
    done_B = state.done_B | ended_B
    return _sharded(SlotState(cache, last_B, state.start_B, number_B, state.limit_B, done_B, texts))


def decode(
    model: Model,
    search: Search,
    weights: DecodingWeights,
    state: SlotState,
    idle_B: Any,
    max_steps: Any,
    until_done: Any,
) -> tuple[SlotState, tuple[jax.Array, ...]]:
    """Returns the slots after up to `max_steps` steps, and what `DecodeResult` holds; idle slots become done."""

    def unfinished(carry: tuple) -> jax.Array:
        count, state = carry
        return (count < max_steps) & (state.done_B.sum() < until_done)

    def body(carry: tuple) -> tuple:
        count, state = carry
        return count + 1, decode_step(model, search, weights, state)

    state = state._replace(done_B=state.done_B | idle_B)
    state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]
    # Copies, as the state itself will be donated.
    return state, jax.tree.map(jnp.copy, (state.done_B, state.number_B, *search.read(state.texts)))


def grow(state: SlotState, by: int) -> SlotState:
    """Returns the slots with capacity for prompts that are `by` tokens longer."""
    return _sharded(state._replace(cache=kv_cache.grow(state.cache, by)))


def resize(search: Search, state: SlotState, slots_B: Any) -> SlotState:
    """Returns the state of these slots, in this order."""
    cache = kv_cache.select(state.cache, slots_B, search.num_beams)
    last_B = state.last_B[kv_cache.rows_of(slots_B, search.num_beams)]
    return _sharded(SlotState(cache, last_B, *jax.tree.map(lambda array: array[slots_B], tuple(state[2:]))))


def _seen(model: Model, batch: PrefillBatch, first_P: jax.Array) -> jax.Array:
    """Returns which tokens [P, V] a repetition penalty is for: a causal model's prompt, or the start token."""
    times_PV = jnp.zeros((len(first_P), model.config.vocab_size), jnp.int32)
    rows_P1 = jnp.arange(len(first_P))[:, None]
    if model.kind == "causal":
        return times_PV.at[rows_P1, batch.tokens_PS].add(batch.segments_PS) > 0
    return times_PV.at[rows_P1, first_P[:, None]].add(1) > 0


def _sharded(state: SlotState) -> SlotState:
    """Splits the slots over the devices as the rows of a batch are."""

    def constrain(axes: str, array: jax.Array) -> jax.Array:
        return sharding.constrain(array, " ".join(axes))

    rest = jax.tree.map(lambda array: constrain("B" + "." * (array.ndim - 1), array), tuple(state[1:]))
    return SlotState(kv_cache.map_axes(constrain, state.cache), *rest)
