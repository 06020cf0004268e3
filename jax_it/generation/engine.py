"""Compiled programs that decode many prompts at a time on the devices: `slots.py` has the functions they compute."""

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.generation import chunked_prefill, length_buckets, prompt_lookup, slots
from jax_it.generation.beam_search import BeamSearch
from jax_it.generation.likelihood import token_log_probs
from jax_it.generation.prefix_cache import BLOCK
from jax_it.generation.requests import (
    GREEDY,
    DecodeResult,
    PrefillBatch,
    PromptLogProbs,
    Sampling,
    SlotSettings,
    TopLogProbs,
    check,
    slot_settings,
)  # fmt: skip
from jax_it.generation.sampling import Sampler
from jax_it.generation.slots import Strategy
from jax_it.models import Model, Params

PREFILL_CHUNK = 256
SMALLEST_WIDTH = 32  # of prompts, once the widths are fixed


class LoweredPrograms(NamedTuple):
    """What `Engine.lower` returns; trees have ShapeDtypeStructs."""

    prefill: jax.stages.Lowered
    decode: jax.stages.Lowered
    prompts: tuple[int, ...]  # the prefill's number of prompts and their width
    weights: Any  # as prepared for decoding
    state: Any  # of all slots


class Engine:
    """The compiled programs of one model and one decoding strategy; `load` gives an engine with weights and slots.

    `sampling` is for requests without settings of their own; its beams are for all. Requests may ask for the
    log-probabilities of up to `max_logprobs` alternatives to a token; a beam search gives none.

    For a server, `warm_up` fixes and compiles all shapes; about `prefill_chunk` tokens of prompts are then computed
    between two steps of the running texts, and where `can_chunk` longer prompts are computed in parts.
    `prefix_cache_bytes` are for keys and values of shared beginnings of prompts, in blocks of 64 tokens; models with
    sliding windows have none, since of a window's layers the beginnings are not kept. On one device a step then costs
    less while few slots are busy: it decodes the first ones, as many as one of the `decode_sizes` has. A
    prefill of few prompts costs less, too.

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
        max_logprobs: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
        prefix_cache_bytes: int = 0,
    ):
        check(sampling, max_new_tokens, model.config.vocab_size)
        self.eos_ids = tuple(dict.fromkeys([*model.config.eos_token_ids, *eos_ids]))
        if not self.eos_ids:
            raise ValueError("no end token: texts would never end")
        beams = sampling.num_beams > 1
        if beams and sampling.num_samples > sampling.num_beams:
            raise ValueError(f"{sampling.num_samples} texts of a prompt, from {sampling.num_beams} beams")
        looks_up = sampling.prompt_lookup_num_tokens > 0
        if looks_up:
            prompt_lookup.check(model, sampling)
        sampler = Sampler(self.eos_ids, max_new_tokens, max_logprobs, sampling.prompt_lookup_num_tokens)
        strategy: Strategy = sampler
        if beams:
            strategy = BeamSearch(sampling, self.eos_ids, max_new_tokens)
        self.sampling, self.num_beams = sampling, strategy.num_beams
        self.max_new_tokens, self.vocab_size = max_new_tokens, model.config.vocab_size
        self.max_logprobs = 0 if beams else max_logprobs
        self.slots_per_request = 1 if beams else sampling.num_samples
        self.shards = sharding.batch_parts(mesh)  # the numbers of slots and of prompts are multiples of it
        self.num_slots = sharding.round_up_to_shards(max(batch_size, self.slots_per_request * self.shards), mesh)
        self.prefill_chunk = prefill_chunk
        self.can_chunk = model.can_extend and not beams and not looks_up
        self.scores_prompts = model.kind == "causal"
        self._start_token = None if model.kind == "causal" else model.start_and_pad[0]
        self.num_blocks = 0
        c: Any = model.config
        if self.can_chunk and not any(kind.window for kind in c.layer_kinds):
            bytes_of_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(model.options.dtype).itemsize
            self.num_blocks = prefix_cache_bytes // (bytes_of_token * BLOCK)
        self.prompt_widths: tuple[int, ...] = ()  # those that prompts are padded to, after `warm_up`
        self._score_widths: tuple[int, ...] = ()  # and of prompts whose log-probabilities are asked for
        self.decode_sizes: tuple[int, ...] = ()  # after `warm_up`: numbers of slots, ascending
        self.shapes: set[tuple[str, int, int]] = set()
        self._mesh = mesh
        self._params: Params = {}
        self._weights: Any = None  # prepared for decoding
        self._state: Any = None
        self._blocks: Any = None
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
                partial(slots.decode, model, strategy, plain_step=prompt_lookup.decode_step if looks_up else None),
                donate_argnums=1,
                out_shardings=(None, sharding.replicated(mesh)),
            ),
            "read_top": jax.jit(lambda state: state.texts.top, out_shardings=sharding.replicated(mesh)),
            "copy": jax.jit(slots.copy, donate_argnums=0),
            "resize": jax.jit(partial(slots.resize, strategy)),
            "extend": jax.jit(partial(chunked_prefill.extend, model), donate_argnums=1),
            "begin": jax.jit(partial(chunked_prefill.begin, sampler), donate_argnums=0),
            "init_blocks": jax.jit(chunked_prefill.init_blocks, static_argnums=1),
            "load_prefix": jax.jit(chunked_prefill.load_prefix, donate_argnums=0),
            "save_prefix": jax.jit(chunked_prefill.save_prefix, donate_argnums=0),
            "score": jax.jit(
                partial(token_log_probs, model, alternatives=self.max_logprobs), out_shardings=sharding.replicated(mesh)
            ),
        }

    def load(self, params: Params) -> "Engine":
        """Return an engine with these weights and empty slots, which shares the programs compiled so far."""
        loaded = copy.copy(self)
        loaded._params, loaded._weights, loaded._state, loaded._capacity = params, None, None, 0
        loaded._blocks, loaded.prompt_widths, loaded._score_widths, loaded.decode_sizes = None, (), (), ()
        return loaded

    def lower(self, params: Params, max_prompt: int) -> "LoweredPrograms":
        """Return the largest prefill and the decoding step after `warm_up`, lowered from shapes with shardings.

        `params` has ShapeDtypeStructs, and the mesh may be of devices that are not attached.
        """

        def results(lowered: jax.stages.Lowered) -> Any:
            shardings = lowered.compile().output_shardings
            return jax.tree.map(
                lambda leaf, each: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each),
                lowered.out_info, shardings,
            )  # fmt: skip

        width = _fixed_widths(min(max_prompt, self.prefill_chunk) if self.can_chunk else max_prompt)[-1]
        rows = self.prefill_sizes(width)[-1]
        slots_Q = prompts_Q = np.zeros(rows, np.int32)
        batch = PrefillBatch(*length_buckets.pad([], rows, width), slots_Q, prompts_Q, slot_settings([], rows))
        with jax.set_mesh(self._mesh):
            weights = results(self._prepare.lower(params))
            capacity = length_buckets.round_up(max_prompt)
            state = results(self._programs["init"].lower(params, self.num_slots, capacity))
            idle, one = np.zeros(self.num_slots, bool), np.int32(1)
            return LoweredPrograms(
                self._programs["insert"].lower(params, state, batch),
                self._programs["decode"].lower(weights, state, idle, one, one, None),
                batch.tokens_QS.shape, weights, state,
            )  # fmt: skip

    def warm_up(self, max_prompt: int) -> None:
        """Compile all that requests with prompts of at most `max_prompt` tokens can need, and nothing after that.

        The number of slots and the widths of prompts are fixed from then on. Takes minutes where nothing is cached.
        """
        longest = min(max_prompt, self.prefill_chunk) if self.can_chunk else max_prompt
        self.prompt_widths = widths = _fixed_widths(longest)
        self._score_widths = _fixed_widths(max_prompt)
        self.reserve(length_buckets.round_up(max_prompt))
        if self._capacity <= BLOCK:
            self.num_blocks = 0
        for width in widths:
            for rows in self.prefill_sizes(width):
                no_slots, no_prompts = np.full(rows, self.num_slots, np.int32), np.zeros(rows, np.int32)
                self.insert(
                    PrefillBatch(*length_buckets.pad([], rows, width), no_slots, no_prompts, slot_settings([], rows))
                )
        if self.can_chunk:
            for width in (self.small_chunk, self.prefill_chunk):
                for rows in self.extend_sizes(width):
                    self.extend([(self.num_slots, [], 0)] * rows, width)
        self.begin(0, [0, 0], slot_settings([], 1))
        self.copy(0, 0)
        if self.num_blocks:
            self.save_prefix(0, [])
            self.load_prefix(0, [], 0)
        self.decode_sizes = _sizes(self.num_slots, self.shards)
        for size in self.decode_sizes:
            for plain in (True, False):
                self.decode([True] * size, 1, size, plain)
        if self.max_logprobs:
            self.decode([True] * self.num_slots, 1, self.num_slots, top=True)
            if self.scores_prompts:
                for width in self._score_widths:
                    self.prompt_log_probs([0] * width)

    @property
    def max_prompt(self) -> int:
        """Return the number of tokens that prompts may have after `warm_up`."""
        return self._capacity

    @property
    def small_chunk(self) -> int:
        """Return the width of the last parts of prompts, of which several are computed together."""
        return min(self.prefill_chunk, max(SMALLEST_WIDTH, self.prefill_chunk // 4))

    def prefill_sizes(self, width: int) -> tuple[int, ...]:
        """Return how many prompts of a width can be prefilled together after `warm_up`: a few numbers, ascending."""
        most = sharding.round_up_to_shards(max(1, min(self.num_slots, self.prefill_chunk // width)), self._mesh)
        return _sizes(most, self.shards)

    def extend_sizes(self, width: int) -> tuple[int, ...]:
        """Return how many prompts can be extended together by up to `width` tokens: a few numbers, ascending."""
        return _sizes(max(1, self.prefill_chunk // width))

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

    def extend(self, prompts: Sequence[tuple[int, Sequence[int], int]], width: int) -> None:
        """Compute more of some prompts: (slot, tokens, how many tokens of the prompt are there before these)."""
        rows = next(size for size in self.extend_sizes(width) if size >= len(prompts))
        padding = rows - len(prompts)
        batch = chunked_prefill.ChunkBatch(
            *length_buckets.pad([tokens for _, tokens, _ in prompts], rows, width),
            np.array([slot for slot, _, _ in prompts] + [self.num_slots] * padding, np.int32),
            np.array([start for _, _, start in prompts] + [0] * padding, np.int32),
        )
        self._state = self._run("extend", self.num_slots, width, self._weights, self._state, batch)

    def begin(self, slot: int, prompt: Sequence[int], settings: SlotSettings) -> None:
        """Start the text of a slot, in which all of the prompt but the last token is computed, or all of a source."""
        if self._start_token is not None:
            prompt = [self._start_token]
        counts_V = np.zeros(self.vocab_size, np.uint16)
        counts_V[np.asarray(prompt)] = 1
        arguments = np.int32(slot), np.int32(prompt[-1]), np.int32(len(prompt) - 1), counts_V, settings
        self._state = self._run("begin", self.num_slots, 0, self._state, *arguments)

    def load_prefix(self, slot: int, blocks: Sequence[int], length: int) -> None:
        """Begin a slot's prompt with cached blocks, which have `length` tokens."""
        arguments = np.int32(slot), self._block_numbers(blocks, 0), np.int32(length)
        self._state = self._run("load_prefix", self.num_slots, 0, self._state, self._blocks, *arguments)

    def save_prefix(self, slot: int, blocks: Sequence[int]) -> None:
        """Cache the beginning of a slot's prompt in blocks with these numbers; -1: it is there already."""
        if self._blocks is None:
            self._blocks = self._run("init_blocks", self.num_slots, self.num_blocks, self._state, self.num_blocks)
        numbers = [self.num_blocks if block < 0 else block for block in blocks]
        arguments = self._blocks, self._state, np.int32(slot), self._block_numbers(numbers, self.num_blocks)
        self._blocks = self._run("save_prefix", self.num_slots, 0, *arguments)

    def _block_numbers(self, numbers: Sequence[int], padding: int) -> np.ndarray:
        size = self._capacity // BLOCK
        return np.array([*numbers, *[padding] * (size - len(numbers))], np.int32)

    def prompt_log_probs(self, prompt: Sequence[int], alternatives: int = 0) -> PromptLogProbs:
        """Return what a causal model predicts of a prompt."""
        width = next((w for w in self._score_widths if w >= len(prompt)), length_buckets.round_up(len(prompt)))
        log_probs, tops = self._run("score", 1, width, self._params, *length_buckets.pad([prompt], 1, width))
        number = len(prompt) - 1
        top = None
        if alternatives:
            top = TopLogProbs(*(np.asarray(x)[0, :number, :alternatives] for x in (tops[1], tops[0])))
        return PromptLogProbs(np.asarray(log_probs)[0, :number], top)

    def decode(
        self, idle: Sequence[bool], max_steps: int, until_done: int, plain: bool = False, top: bool = False,
        allowed: Mapping[int, np.ndarray] | None = None,
    ) -> DecodeResult:  # fmt: skip
        """Decode up to `max_steps` tokens in every slot that is not idle; stop once `until_done` slots are done.

        `idle` has the first slots, as many as one of the `decode_sizes`, or all; the others stay as they are. Idle ones
        count as done. All steps run on the devices, and the texts then come to the host together. `plain` says that all
        texts are (see `TextSettings`), for which there is a faster program. `top`: read alternatives too. `allowed` has
        the tokens [V] that constraints of some slots allow next, for one step.
        """
        allowed_BA = None
        if not plain:
            allowed_BA = np.full((len(idle), -(-self.vocab_size // 8)), 255, np.uint8)
            for slot, allowed_V in (allowed or {}).items():
                allowed_BA[slot] = np.packbits(allowed_V, bitorder="little")
        arguments = self._weights, self._state, np.array(idle), np.int32(max_steps), np.int32(until_done), allowed_BA
        program = "decode" if plain else "decode_any"
        self._state, result = self._run(program, len(idle), self._capacity, *arguments)
        tops = TopLogProbs(*map(np.asarray, self._run("read_top", self.num_slots, 0, self._state))) if top else None
        done_B, number_B, tokens_BOT, log_probs_BOT = map(np.asarray, result)
        return DecodeResult(done_B, number_B, tokens_BOT, log_probs_BOT, tops)

    def copy(self, source: int, target: int) -> None:
        """Make a slot the same as another one."""
        self._state = self._run("copy", self.num_slots, 0, self._state, np.int32(source), np.int32(target))

    def resize(self, order: Sequence[int]) -> None:
        """Replace the slots by those in `order`. One that is named again must be idle from now on."""
        self._state = self._run("resize", len(order), self._capacity, self._state, np.array(order, np.int32))

    def block_until_ready(self) -> None:
        """Wait until the devices have run all that was asked of them."""
        jax.block_until_ready((self._weights, self._state, self._blocks))

    def _run(self, program: str, num_slots: int, width: int, *arguments: Any) -> Any:
        self.shapes.add((program, num_slots, width))
        with jax.set_mesh(self._mesh):
            return self._programs[program.removesuffix("_any")](*arguments)


def _sizes(most: int, shards: int = 1) -> tuple[int, ...]:
    """Return few numbers of slots or prompts, each about four times the one before; with several shards, one."""
    sizes = [most]
    while shards == 1 and sizes[0] >= 4:
        sizes.insert(0, sizes[0] // 4)
    return tuple(sizes)


def _fixed_widths(longest: int) -> tuple[int, ...]:
    """Return few widths, each four times the one before, for prompts of up to `longest` tokens."""
    widths = [length_buckets.round_up(longest)]
    while widths[0] > SMALLEST_WIDTH:
        widths.insert(0, max(SMALLEST_WIDTH, widths[0] // 4))
    return tuple(widths)
