"""Decide which request gets which slot, which prompts are prefilled together, and when a text ends: without JAX.

    scheduler = Scheduler(engine.load(params), stream_interval=8)
    scheduler.add_request(Request(0, prompt))       # at any time between two steps; so is abort(request_id)
    while scheduler.has_unfinished:
        for output in scheduler.step(): ...         # its tokens so far; the last one has a finish_reason

Every process of a run must make the same calls: what is decided depends on nothing else.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jax_it.data.packing import bucket
from jax_it.errors import UserError
from jax_it.generation import length_buckets
from jax_it.generation.prefix_cache import BLOCK, PrefixCache
from jax_it.generation.requests import (
    INVALID,
    Constraint,
    DecodeResult,
    FinishReason,
    PrefillBatch,
    Request,
    RequestOutput,
    Sampling,
    TextSettings,
    TopLogProbs,
    check,
    slot_settings,
)  # fmt: skip

if TYPE_CHECKING:
    from jax_it.generation.engine import Engine
    from jax_it.models import Params

MIN_CAPACITY = 128  # tokens of a prompt that the cache holds, at least
MAX_CAPACITY = 1 << 30
STOP_INTERVAL = 16  # steps after which `stop` is asked
PREFILL_SHARE = 8  # at most an eighth of the slots is prefilled at a time, and fewer with prompts of over 128 tokens
PREFILL_TOKENS = 2048  # but at least this many tokens: fewer at a time cost more each
SHRINK = 4  # a quarter of the slots is left when no more requests wait
SHRINKABLE = 16  # slots; fewer are left as they are


class QueuedPrompt(NamedTuple):
    """Texts of one request that get their slots together."""

    request: Request
    samples: range  # which of the request's texts


@dataclass
class RunningText:
    """The text that a slot decodes; of a beam search, all texts of a request."""

    request: Request
    sample: int  # which of the request's texts
    settings: TextSettings
    last: RequestOutput  # of a text with a constraint all so far; else without tokens
    constraint: Constraint | None = None  # made when it is first asked
    prefilled: int | None = None  # tokens of its prompt that are computed, while it is prefilled in chunks

    @property
    def is_plain(self) -> bool:
        return self.settings.is_plain and self.request.constraint is None


class PrefillGroup(NamedTuple):
    """Prompts to prefill together."""

    prompts: list[QueuedPrompt]
    width: int  # that they are padded to


class Scheduler:
    """Give the slots of a loaded engine to requests, and read their texts.

    For lists of prompts, `stream_interval` is 0: every text has one output, at its end, and waiting requests are taken
    shortest prompt first, a full group at a time once it fits, so that prompts of similar length are padded together.
    For a server it is a number of tokens: each running text has an output after that many (a beam search only at its
    end), and requests are taken first come, first served, as soon as slots are free. With an engine that is warmed up,
    one group of prompts and one chunk of a longer prompt are prefilled between two steps. Prompts that begin alike
    share what is computed, and so do the texts of one request. Texts are kept in the first slots, since a step decodes
    no more of them than it has to. Either way a text does not depend on other requests, nor on when it begins.
    """

    def __init__(self, engine: "Engine", stream_interval: int = 0):
        self._engine, self._stream_interval = engine, stream_interval
        self._serves = bool(engine.prompt_widths)
        self._each = 1 if self._serves else engine.slots_per_request
        self._slots: list[RunningText | None] = [None] * engine.num_slots
        self._queue: deque[QueuedPrompt] = deque()  # not in a group yet
        self._groups: deque[PrefillGroup] = deque()  # not in slots yet
        self._prefilling: list[tuple[int, RunningText]] = []  # in slots, in order of arrival
        self.prefix_cache = PrefixCache(engine.num_blocks) if self._serves and engine.num_blocks else None
        self.cached_tokens = 0  # of prompts so far, that were not computed again

    def add_request(self, request: Request) -> None:
        """Queue a request, whose `stop` is not asked of beams.

        Raises UserError for settings out of range, and ValueError for what the engine does not have: a limit below 1,
        a prompt longer than it was warmed up for, other beams than its own or constraints of beams, more alternatives
        than `max_logprobs`, log-probabilities of an encoder-decoder's source.
        """
        engine, sampling = self._engine, self._sampling(request)
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise ValueError("a text has at least one token, its end token")
        if request.sampling is not None:
            check(sampling, engine.max_new_tokens, engine.vocab_size)
            if engine.num_beams > 1 or sampling.num_beams > 1:
                raise ValueError("a beam search has the settings of its engine")
        if engine.num_beams > 1 and request.constraint:
            raise ValueError("a beam search takes no constraint")
        if max(request.logprobs or 0, request.prompt_logprobs or 0) > engine.max_logprobs:
            raise ValueError(f"more alternatives to a token than {engine.max_logprobs}")
        if request.prompt_logprobs is not None and not engine.scores_prompts:
            raise ValueError("an encoder-decoder predicts nothing of its source")
        if self._serves and not 0 < len(request.prompt) <= engine.max_prompt:
            raise ValueError(f"a prompt of {len(request.prompt)} tokens; it may have 1 to {engine.max_prompt}")
        samples = 1
        if engine.num_beams > 1:
            request = replace(request, stop=None)
        else:
            samples = sampling.num_samples
        self._queue.extend(
            QueuedPrompt(request, range(first, min(first + self._each, samples)))
            for first in range(0, samples, self._each)
        )

    def abort(self, request_id: int) -> None:
        """Drop a request, which gets no more outputs; its slots are free from the next step."""
        waiting = [*(prompt for group in self._groups for prompt in group.prompts), *self._queue]
        self._queue = deque(prompt for prompt in waiting if prompt.request.request_id != request_id)
        self._groups.clear()
        self._slots = [None if each and each.request.request_id == request_id else each for each in self._slots]

    @property
    def has_unfinished(self) -> bool:
        """Return whether any request waits or runs."""
        return bool(self._queue or self._groups or any(self._slots))

    @property
    def num_waiting(self) -> int:
        """Return how many requests, or texts of requests, have no slot."""
        return len(self._queue) + sum(len(group.prompts) for group in self._groups)

    @property
    def num_running(self) -> int:
        """Return how many texts have a slot: their share of the slots is that of the cache in use."""
        return len(self._slots) - self._slots.count(None)

    def step(self) -> list[RequestOutput]:
        """Prefill the requests that are next, decode for a while, and return the outputs that are due."""
        if self._serves:
            self._prefill_some()
            busy = bool(self._queue or self._prefilling)
            return self._decode(1 if busy else self._stream_interval, len(self._slots))
        if len(self._queue) * self._each > self._slots.count(None) and len(self._slots) < self._engine.num_slots:
            self._resize(self._engine.num_slots)
        self._prefill()
        if not (running := self.num_running):
            return []
        waiting = bool(self._queue or self._groups)
        fewer = self._round_up(len(self._slots) // SHRINK)
        if waiting or len(self._slots) < max(SHRINKABLE, self._engine.num_slots) or fewer == len(self._slots):
            fewer = 0
        if running <= fewer:
            self._resize(fewer)
            fewer = 0
        # Decoding stops when the next group fits, or when the slots are to become fewer, or when all texts have ended.
        next_group = len(self._groups[0].prompts) if self._groups else 1
        until_done = next_group * self._each if waiting else len(self._slots) - fewer
        asked = any(text and text.request.stop for text in self._slots)
        steps = self._stream_interval or (STOP_INTERVAL if asked else self._engine.max_new_tokens)
        return self._decode(steps, until_done)

    def _decode(self, steps: int, until_done: int) -> list[RequestOutput]:
        """Decode up to a number of steps, until so many slots are done, and return the outputs that are due."""
        size = self._gather() if self._serves else len(self._slots)
        allowed, outputs = self._ask_constraints()
        texts = [text for text in self._slots if text and text.prefilled is None]
        if not texts:
            return outputs
        result = self._engine.decode(
            [not text or text.prefilled is not None for text in self._slots[:size]],
            1 if allowed else steps,
            size if allowed else min(until_done, size),
            plain=all(text.is_plain for text in texts),
            top=any(text.request.logprobs for text in texts),
            allowed=allowed,
        )
        return [*outputs, *self._read(result)]

    def _gather(self) -> int:
        """Move the texts that decode into the first slots, and return how many slots a step has to decode."""
        sizes = self._engine.decode_sizes
        decoding = [slot for slot, text in enumerate(self._slots) if text and text.prefilled is None]
        size = next(size for size in sizes if size >= len(decoding))
        free = [slot for slot, text in enumerate(self._slots[:size]) if text is None]
        last = [slot for slot in decoding if slot >= size]
        for slot, target in zip(last, free, strict=False):
            self._engine.copy(slot, target)
            self._slots[target], self._slots[slot] = self._slots[slot], None
        # Where prompts under way are in between, some texts stay behind them.
        return size if len(free) >= len(last) else next(size for size in sizes if size > last[-1])

    def _ask_constraints(self) -> tuple[dict[int, np.ndarray], list[RequestOutput]]:
        """Return the tokens that constraints allow next, by slot, and the outputs of texts that end here."""
        allowed: dict[int, np.ndarray] = {}
        outputs = []
        for slot, text in enumerate(self._slots):
            if not text or not text.request.constraint or text.prefilled is not None:
                continue
            reason: FinishReason = "stop"
            try:
                text.constraint = text.constraint or text.request.constraint()
                allowed_V = np.array(text.constraint.allowed(text.last.tokens), bool)
            except Exception:  # of a library that is not ours: this text ends, and no other
                allowed_V, reason = np.zeros(self._engine.vocab_size, bool), "error"
            if np.delete(allowed_V, self._engine.eos_ids).any():
                allowed[slot] = allowed_V
            else:
                outputs.append(text.last._replace(finish_reason=reason))
                self._slots[slot] = None
        return allowed, outputs

    def _resize(self, number: int) -> None:
        """Continue with `number` slots, the running ones first."""
        order = sorted(range(len(self._slots)), key=lambda slot: self._slots[slot] is None)[:number]
        added = number - len(order)
        self._engine.resize([*order, *[0] * added])
        self._slots = [*(self._slots[slot] for slot in order), *[None] * added]

    def _prefill(self) -> None:
        """Start the requests that are next."""
        free = [slot for slot, text in enumerate(self._slots) if text is None]
        idle, fit = len(free) == len(self._slots), len(free) // self._each
        due = min(len(self._queue), fit) if self._stream_interval else len(self._queue)
        self._groups.extend(self._group([self._queue.popleft() for _ in range(due)]))
        started = []
        while self._groups:
            prompts, width = self._groups[0]
            number = min(len(prompts), fit) if idle else len(prompts)  # slots that are all idle are all filled
            if not 0 < number <= fit:
                break
            self._groups.popleft()
            if prompts[number:]:
                self._groups.appendleft(PrefillGroup(prompts[number:], width))
            started.append(PrefillGroup(prompts[:number], width))
            fit -= number
        if started:  # the cache grows once for all of them
            self._engine.reserve(max(MIN_CAPACITY, bucket(max(group.width for group in started), MAX_CAPACITY)))
        for group in started:
            number = sum(len(prompt.samples) for prompt in group.prompts)
            self._insert(group, free[:number])
            free = free[number:]

    def _insert(self, group: PrefillGroup, slots: list[int]) -> None:
        texts = [self._begin(prompt.request, sample) for prompt in group.prompts for sample in prompt.samples]
        for slot, text in zip(slots, texts, strict=True):
            self._slots[slot] = text
        self._engine.insert(self._batch(group, texts, slots))

    def _prefill_some(self) -> None:
        """Start a group of the requests that are next, and compute more of the prompts that are in slots."""
        engine, group, taken = self._engine, PrefillGroup([], 0), list[int]()
        free = [slot for slot, text in enumerate(self._slots) if text is None]
        started = {text.request.request_id for _, text in self._prefilling}
        while self._queue and free:
            request, samples = self._queue[0]
            waits = request.request_id in started  # for the prompt of another of its texts
            is_long = engine.can_chunk and len(request.prompt) > engine.prefill_chunk
            if waits or is_long or (self.prefix_cache and self.prefix_cache.match(request.prompt)):
                slot, text = free.pop(0), self._begin(request, samples[0])
                text.prefilled = 0
                self._slots[slot] = text
                self._prefilling.append((slot, text))
            else:
                width = max(group.width, next(w for w in engine.prompt_widths if w >= len(request.prompt)))
                if len(group.prompts) >= engine.prefill_sizes(width)[-1]:
                    break
                group = PrefillGroup([*group.prompts, self._queue[0]], width)
                taken.append(free.pop(0))
            started.add(request.request_id)
            self._queue.popleft()
        if taken:
            self._insert(group, taken)
            for slot, (request, _) in zip(taken, group.prompts, strict=True):
                self._save_prefix(slot, request.prompt)
                self._begin_copies(slot, request)
        self._prefilling = [(slot, text) for slot, text in self._prefilling if self._slots[slot] is text]
        first: dict[int, tuple[int, RunningText]] = {}  # of each request; its other texts wait for it
        for each in self._prefilling:
            first.setdefault(each[1].request.request_id, each)
        for slot, text in first.values():
            # Asked again at each step: another prompt that begins alike may be complete by then.
            blocks = self.prefix_cache.match(text.request.prompt) if self.prefix_cache and not text.prefilled else []
            if blocks:
                text.prefilled = len(blocks) * BLOCK
                self.cached_tokens += text.prefilled
                engine.load_prefix(slot, blocks, text.prefilled)
        short = [each for each in first.values() if self._rest(each[1]) <= engine.small_chunk]
        long = [each for each in first.values() if self._rest(each[1]) > engine.small_chunk]
        if engine.can_chunk:
            self._extend(short[: engine.extend_sizes(engine.small_chunk)[-1]], engine.small_chunk)
            self._extend(long[: engine.extend_sizes(engine.prefill_chunk)[-1]], engine.prefill_chunk)

    def _rest(self, text: RunningText) -> int:
        """Return how many tokens of a prompt are not computed; the first step computes the last one."""
        assert text.prefilled is not None
        return len(text.request.prompt) - 1 - text.prefilled

    def _extend(self, prompts: list[tuple[int, RunningText]], width: int) -> None:
        """Compute up to `width` more tokens of each prompt, and start the texts of those that are complete."""
        chunks = []
        for slot, text in prompts:
            if number := min(width, self._rest(text)):
                assert text.prefilled is not None
                chunks.append((slot, text.request.prompt[text.prefilled : text.prefilled + number], text.prefilled))
                text.prefilled += number
        if chunks:
            self._engine.extend(chunks, width)
        for slot, text in prompts:
            if not self._rest(text):
                text.prefilled = None
                self._prefilling.remove((slot, text))
                self._engine.begin(slot, text.request.prompt, slot_settings([text.settings], 1))
                self._save_prefix(slot, text.request.prompt)
                self._begin_copies(slot, text.request)

    def _begin_copies(self, slot: int, request: Request) -> None:
        """Start the other texts of a request that have slots, with the prompt that is complete in one of them."""
        for target, text in [each for each in self._prefilling if each[1].request is request]:
            text.prefilled = None
            self._prefilling.remove((target, text))
            self._engine.copy(slot, target)
            self._engine.begin(target, request.prompt, slot_settings([text.settings], 1))

    def _save_prefix(self, slot: int, prompt: Sequence[int]) -> None:
        """Cache the beginning of a prompt that is complete in its slot."""
        if self.prefix_cache:
            blocks = self.prefix_cache.add(prompt)
            if any(block >= 0 for block in blocks):
                self._engine.save_prefix(slot, blocks)

    def _begin(self, request: Request, sample: int) -> RunningText:
        sampling, limit = self._sampling(request), self._engine.max_new_tokens
        settings = TextSettings(
            sampling,
            text_id=request.index * sampling.num_samples + sample,
            limit=min(request.max_new_tokens or limit, limit),
            log_probs=request.logprobs is not None and self._engine.num_beams == 1,
        )
        scored = None
        others = [text for text in self._slots if text and text.request is request]
        if others:
            scored = others[0].last.prompt_log_probs
        elif request.prompt_logprobs is not None:
            scored = self._engine.prompt_log_probs(request.prompt, request.prompt_logprobs)
        nothing = RequestOutput(request.request_id, sample, [], [] if settings.log_probs else None, None, None, scored)
        return RunningText(request, sample, settings, nothing)

    def _sampling(self, request: Request) -> Sampling:
        return self._engine.sampling if request.sampling is None else request.sampling

    def _group(self, prompts: list[QueuedPrompt]) -> list[PrefillGroup]:
        """Return the groups that prompts are prefilled in, the shortest first.

        All groups are full but the first, in which empty rows cost least.
        """
        prompts = sorted(prompts, key=lambda each: len(each.request.prompt))
        widths = length_buckets.choose([len(each.request.prompt) for each in prompts], 1, self._engine.prefill_widths)
        groups: list[PrefillGroup] = []
        while prompts:
            width = widths[len(prompts) - 1]
            start = max(0, len(prompts) - self._prefill_rows(width))
            groups.insert(0, PrefillGroup(prompts[start:], width))
            del prompts[start:]
        return groups

    def _prefill_rows(self, width: int) -> int:
        """Return how many prompts of a width are prefilled together: about as many tokens, whatever the width."""
        most = self._round_up(max(1, self._engine.num_slots // PREFILL_SHARE // self._each))
        tokens = max(PREFILL_TOKENS, most * MIN_CAPACITY)
        return self._round_up(max(1, min(most, tokens // width)))

    def _round_up(self, rows: int) -> int:
        """Return a number of rows of which every device has as many."""
        return -(-rows // self._engine.shards) * self._engine.shards

    def _batch(self, group: PrefillGroup, texts: list[RunningText], slots: list[int]) -> PrefillBatch:
        """Return a group's arrays, padded to a number of prompts, and of their slots, that is compiled."""
        sizes = self._engine.prefill_sizes(group.width) if self._serves else (self._prefill_rows(group.width),)
        rows = next(size for size in sizes if size >= len(group.prompts))
        padding = [0] * (rows * self._each - len(texts))
        prompts_Y = [i for i, prompt in enumerate(group.prompts) for _ in prompt.samples]
        return PrefillBatch(
            *length_buckets.pad([prompt.request.prompt for prompt in group.prompts], rows, group.width),
            slots_Y=np.array(slots + [self._engine.num_slots for _ in padding], np.int32),
            prompts_Y=np.array(prompts_Y + padding, np.int32),
            settings=slot_settings([text.settings for text in texts], rows * self._each),
        )

    def _read(self, result: DecodeResult) -> Iterator[RequestOutput]:
        """Yield the outputs that are due, and free the slots of those that have ended."""
        streams = self._stream_interval and self._engine.num_beams == 1
        for slot, text in enumerate(self._slots):
            if not text or text.prefilled is not None:
                continue
            done = bool(result.done_B[slot])
            if not (done or streams or text.request.stop or text.constraint):
                continue
            outputs = [self._output(text, result, slot, best, done) for best in range(result.tokens_BOT.shape[1])]
            ended = all(output.finish_reason for output in outputs)
            if ended:
                self._slots[slot] = None
            elif text.constraint:
                text.last = outputs[0]
            if ended or streams:
                yield from outputs

    def _output(self, text: RunningText, result: DecodeResult, slot: int, best: int, done: bool) -> RequestOutput:
        """Return the output for the tokens of a slot, which may continue beyond the text's end."""
        request, made_T = text.request, result.tokens_BOT[slot, best, : result.number_B[slot]]
        ends = () if text.settings.sampling.ignore_eos else self._engine.eos_ids
        at = np.flatnonzero(np.isin(made_T, ends))
        tokens = (made_T[: at[0]] if at.size else made_T).tolist()
        number = min(len(tokens) + 1, len(made_T))  # the end token too
        reason: FinishReason | None = None
        if INVALID in tokens:
            reason = "error"
        elif request.stop and request.stop(tokens):
            # Cut at the first token where it holds: it is asked only every few steps.
            number = next(n for n in range(len(tokens) + 1) if request.stop(tokens[:n]))
            tokens, reason = tokens[:number], "stop"
        elif done:
            reason = "stop" if len(tokens) < len(made_T) else "length"
        log_probs, top = None, None
        if request.logprobs is not None:
            log_probs = result.log_probs_BOT[slot, best, :number].tolist()
            if request.logprobs and result.top:
                top = TopLogProbs(*(x[slot, :number, : request.logprobs] for x in result.top))
        scored = text.last.prompt_log_probs
        return RequestOutput(request.request_id, text.sample + best, tokens, log_probs, reason, top, scored)


def generate(
    engine: "Engine",
    params: "Params",
    prompts: Sequence[Sequence[int]],
    stop: Callable[[Sequence[int]], bool] | None = None,
    logprobs: int | None = None,
) -> Iterator[RequestOutput]:
    """Yield every text of the prompts as it ends; request i is prompt i, and `Request` says what `logprobs` are.

    Raises UserError where the model's logits are not finite.
    """
    scheduler = Scheduler(engine.load(params))
    for i, prompt in enumerate(prompts):
        scheduler.add_request(Request(i, prompt, stop=stop, index=i, logprobs=logprobs))
    while scheduler.has_unfinished:
        for output in scheduler.step():
            if output.finish_reason == "error":
                raise UserError(
                    f"the model's logits for prompt {output.request_id + 1} are not finite, so there is no text: its "
                    "weights are broken, or too large for the dtype that it is computed in"
                )
            yield output
