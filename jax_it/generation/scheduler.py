"""Decide which request gets which slot, which prompts are prefilled together, and when a text ends: without JAX.

    scheduler = Scheduler(engine.load(params), stream_interval=8)
    scheduler.add_request(Request(0, prompt))       # at any time between two steps; so is abort(request_id)
    while scheduler.has_unfinished:
        for output in scheduler.step(): ...         # its tokens so far; the last one has a finish_reason

Every process of a run must make the same calls: what is decided depends on nothing else.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jax_it.data.packing import bucket
from jax_it.errors import UserError
from jax_it.generation import length_buckets
from jax_it.generation.requests import INVALID, DecodeResult, FinishReason, PrefillBatch, Request, RequestOutput

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


class Completion(NamedTuple):
    """The text of a request that a slot decodes."""

    request: Request
    sample: int  # which of the request's texts


class PrefillGroup(NamedTuple):
    """Requests to prefill together."""

    requests: list[Request]
    width: int  # that their prompts are padded to


class Scheduler:
    """Give the slots of a loaded engine to requests, and read their texts.

    For lists of prompts, `stream_interval` is 0: every text has one output, at its end, and waiting requests are taken
    shortest prompt first, a full group at a time once it fits, so that prompts of similar length are padded together.
    For a server it is a number of tokens: each running text has an output after that many (a beam search only at its
    end), and requests are taken first come, first served, as soon as slots are free. Either way a text does not depend
    on other requests, nor on when it begins.
    """

    def __init__(self, engine: "Engine", stream_interval: int = 0):
        self._engine, self._stream_interval = engine, stream_interval
        self._each = engine.slots_per_request
        self._slots: list[Completion | None] = [None] * engine.num_slots
        self._queue: deque[Request] = deque()  # not in a group yet
        self._groups: deque[PrefillGroup] = deque()  # not in slots yet

    def add_request(self, request: Request) -> None:
        """Queue a request, whose `stop` is not asked of beams. Raises ValueError for a limit below 1."""
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise ValueError("a text has at least one token, its end token")
        self._queue.append(request if self._engine.num_beams == 1 else replace(request, stop=None))

    def abort(self, request_id: int) -> None:
        """Drop a request, which gets no more outputs; its slots are free from the next step."""
        waiting = [*(request for group in self._groups for request in group.requests), *self._queue]
        self._queue = deque(request for request in waiting if request.request_id != request_id)
        self._groups.clear()
        self._slots = [None if each and each.request.request_id == request_id else each for each in self._slots]

    @property
    def has_unfinished(self) -> bool:
        """Return whether any request waits or runs."""
        return bool(self._queue or self._groups or any(self._slots))

    def step(self) -> list[RequestOutput]:
        """Prefill the requests that are next, decode for a while, and return the outputs that are due."""
        if len(self._queue) * self._each > self._slots.count(None) and len(self._slots) < self._engine.num_slots:
            self._resize(self._engine.num_slots)
        self._prefill()
        running = len(self._slots) - self._slots.count(None)
        if not running:
            return []
        waiting = bool(self._queue or self._groups)
        fewer = self._round_up(len(self._slots) // SHRINK)
        if waiting or len(self._slots) < max(SHRINKABLE, self._engine.num_slots) or fewer == len(self._slots):
            fewer = 0
        if running <= fewer:
            self._resize(fewer)
            fewer = 0
        # Decoding stops when the next group fits, or when the slots are to become fewer, or when all texts have ended.
        next_group = len(self._groups[0].requests) if self._groups else 1
        until_done = next_group * self._each if waiting else len(self._slots) - fewer
        asked = any(each and each.request.stop for each in self._slots)
        steps = self._stream_interval or (STOP_INTERVAL if asked else self._engine.max_new_tokens)
        return list(self._read(self._engine.decode([each is None for each in self._slots], steps, until_done)))

    def _resize(self, number: int) -> None:
        """Continue with `number` slots, the running ones first."""
        order = sorted(range(len(self._slots)), key=lambda slot: self._slots[slot] is None)[:number]
        added = number - len(order)
        self._engine.resize([*order, *[0] * added])
        self._slots = [*(self._slots[slot] for slot in order), *[None] * added]

    def _prefill(self) -> None:
        """Start the requests that are next."""
        free = [slot for slot, completion in enumerate(self._slots) if completion is None]
        idle, fit = len(free) == len(self._slots), len(free) // self._each
        due = min(len(self._queue), fit) if self._stream_interval else len(self._queue)
        self._groups.extend(self._group([self._queue.popleft() for _ in range(due)]))
        started = []
        while self._groups:
            requests, width = self._groups[0]
            number = min(len(requests), fit) if idle else len(requests)  # slots that are all idle are all filled
            if not 0 < number <= fit:
                break
            self._groups.popleft()
            if requests[number:]:
                self._groups.appendleft(PrefillGroup(requests[number:], width))
            started.append(PrefillGroup(requests[:number], width))
            fit -= number
        if started:  # the cache grows once for all of them
            self._engine.reserve(max(MIN_CAPACITY, bucket(max(group.width for group in started), MAX_CAPACITY)))
        for group in started:
            completions = [Completion(request, sample) for request in group.requests for sample in range(self._each)]
            taken, free = free[: len(completions)], free[len(completions) :]
            for slot, completion in zip(taken, completions, strict=True):
                self._slots[slot] = completion
            self._engine.insert(self._batch(group, completions, taken))

    def _group(self, requests: list[Request]) -> list[PrefillGroup]:
        """Return the groups that requests are prefilled in, shortest prompts first.

        All groups are full but the first, in which empty rows cost least.
        """
        requests = sorted(requests, key=lambda request: len(request.prompt))
        widths = length_buckets.choose([len(each.prompt) for each in requests], 1, self._engine.prefill_widths)
        groups: list[PrefillGroup] = []
        while requests:
            width = widths[len(requests) - 1]
            start = max(0, len(requests) - self._prefill_rows(width))
            groups.insert(0, PrefillGroup(requests[start:], width))
            del requests[start:]
        return groups

    def _prefill_rows(self, width: int) -> int:
        """Return how many prompts of a width are prefilled together: about as many tokens, whatever the width."""
        most = self._round_up(max(1, self._engine.num_slots // PREFILL_SHARE // self._each))
        tokens = max(PREFILL_TOKENS, most * MIN_CAPACITY)
        return self._round_up(max(1, min(most, tokens // width)))

    def _round_up(self, rows: int) -> int:
        """Return a number of rows of which every device has as many."""
        return -(-rows // self._engine.shards) * self._engine.shards

    def _batch(self, group: PrefillGroup, completions: list[Completion], slots: list[int]) -> PrefillBatch:
        """Return a group's arrays, padded to as many prompts and slots as all groups of its width have."""
        rows, limit = self._prefill_rows(group.width), self._engine.max_new_tokens
        padding = [0] * (rows * self._each - len(completions))
        return PrefillBatch(
            *length_buckets.pad([request.prompt for request in group.requests], rows, group.width),
            slots_Y=np.array(slots + [self._engine.num_slots for _ in padding], np.int32),
            prompts_Y=np.array([i // self._each for i in range(len(completions))] + padding, np.int32),
            text_ids_Y=np.array(
                [each.request.request_id * self._each + each.sample for each in completions] + padding, np.int32
            ),
            limits_Y=np.array(
                [min(each.request.max_new_tokens or limit, limit) for each in completions] + padding, np.int32
            ),
        )

    def _read(self, result: DecodeResult) -> Iterator[RequestOutput]:
        """Yield the outputs that are due, and free the slots of those that have ended."""
        streams = self._stream_interval and self._engine.num_beams == 1
        for slot, completion in enumerate(self._slots):
            done = bool(result.done_B[slot])
            if not completion or not (done or streams or completion.request.stop):
                continue
            number = int(result.number_B[slot])
            outputs = [
                self._output(
                    completion.request, completion.sample + best, tokens_T[:number].tolist(), log_probs_T, done
                )
                for best, (tokens_T, log_probs_T) in enumerate(
                    zip(result.tokens_BOT[slot], result.log_probs_BOT[slot], strict=True)
                )
            ]
            ended = all(output.finish_reason for output in outputs)
            if ended:
                self._slots[slot] = None
            if ended or streams:
                yield from outputs

    def _output(self, request: Request, sample: int, made: list[int], log_probs_T: Any, done: bool) -> RequestOutput:
        """Return the output for the tokens `made`, which may continue beyond the text's end."""
        tokens = list(takewhile(lambda token: token not in self._engine.eos_ids, made))
        scored = min(len(tokens) + 1, len(made))  # the end token too
        reason: FinishReason | None = None
        if INVALID in tokens:
            reason = "error"
        elif request.stop and request.stop(tokens):
            # Cut at the first token where it holds: it is asked only every few steps.
            scored = next(n for n in range(len(tokens) + 1) if request.stop(tokens[:n]))
            tokens, reason = tokens[:scored], "stop"
        elif done:
            reason = "stop" if len(tokens) < len(made) else "length"
        log_probs = log_probs_T[:scored].tolist() if self._engine.log_probs else None
        return RequestOutput(request.request_id, sample, tokens, log_probs, reason)


def generate(
    engine: "Engine",
    params: "Params",
    prompts: Sequence[Sequence[int]],
    stop: Callable[[Sequence[int]], bool] | None = None,
) -> Iterator[RequestOutput]:
    """Yield every text of the prompts as it ends; request i is prompt i.

    Raises UserError where the model's logits are not finite.
    """
    scheduler = Scheduler(engine.load(params))
    for i, prompt in enumerate(prompts):
        scheduler.add_request(Request(i, prompt, stop=stop))
    while scheduler.has_unfinished:
        for output in scheduler.step():
            if output.finish_reason == "error":
                raise UserError(
                    f"the model's logits for prompt {output.request_id + 1} are not finite, so there is no text: its "
                    "weights are broken, or too large for the dtype that it is computed in"
                )
            yield output
