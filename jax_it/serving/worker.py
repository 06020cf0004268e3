"""The thread that owns engines and schedulers: what JAX does for requests is done here, one step at a time.

On the event loop, `submit` gives a `Ticket` whose `outputs` come one by one, until its block ends. In the thread, each
turn takes what was submitted and dropped since the last one, and steps every scheduler that has requests.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_it.data import chat
from jax_it.errors import first_line
from jax_it.generation import Engine, Request, RequestOutput, Scheduler, StopStrings
from jax_it.generation.requests import GREEDY, Constraint, Sampling
from jax_it.serving.models import ServedModel

MAX_BEAM_ENGINES = 4  # compiled for one kind of beam search each; the one used longest ago makes way

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request to the server, and what its texts are like."""

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    index: int = 0  # among the prompts of its request
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None


class EngineFailed(Exception):
    """Raised for a request that the engine failed with."""


class Overloaded(Exception):
    """Raised for a request that needs another compiled engine while all of these are busy."""


@dataclass(eq=False)
class Ticket:
    """A request under way: the prompts of one HTTP request. Its outputs arrive on the event loop that submitted it."""

    model: str
    prompts: Sequence[Prompt]
    loop: asyncio.AbstractEventLoop
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None  # when the step began that its first output came from
    _queue: asyncio.Queue[RequestOutput | Exception] = field(default_factory=asyncio.Queue)
    aborted: bool = False

    @property
    def texts(self) -> int:
        return sum(prompt.sampling.num_samples for prompt in self.prompts)

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Yield outputs until every text has ended; `request_id` is the number of the prompt.

        Raises EngineFailed, or another exception that the engine raised for this request.
        """
        left = self.texts
        while left:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item.finish_reason is not None
            yield item

    def put(self, item: RequestOutput | Exception) -> None:
        self._queue.put_nowait(item)


class _Runner:
    """A scheduler and the tickets whose requests it has."""

    def __init__(self, engine: Engine, params: Any, stream_interval: int):
        self._engine, self._params, self._interval = engine, params, stream_interval
        self._ids = itertools.count()
        self._tickets: dict[int, tuple[Ticket, int]] = {}
        self._requests: dict[int, Request] = {}
        self._left: dict[int, int] = {}  # texts that have not ended
        self._restart()

    def _restart(self) -> None:
        self.scheduler = Scheduler(self._engine.load(self._params), self._interval)

    @property
    def is_busy(self) -> bool:
        return bool(self._tickets)

    @property
    def running_and_waiting(self) -> tuple[int, int]:
        """How many texts have a slot, and how many have none yet; any thread may ask."""
        texts = sum(list(self._left.values()))
        running = min(texts, self._engine.num_slots)
        return running, texts - running

    def add(self, ticket: Ticket, number: int, stop: StopStrings | None) -> None:
        prompt = ticket.prompts[number]
        request = Request(
            next(self._ids), prompt.tokens, prompt.max_new_tokens, stop, prompt.sampling, prompt.index, prompt.logprobs,
            prompt.prompt_logprobs, prompt.constraint,
        )  # fmt: skip
        self.scheduler.add_request(request)
        self._tickets[request.request_id] = ticket, number
        self._requests[request.request_id] = request
        self._left[request.request_id] = prompt.sampling.num_samples

    def drop(self, ticket: Ticket) -> None:
        for request_id in [id for id, (owner, _) in self._tickets.items() if owner is ticket]:
            self.scheduler.abort(request_id)
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        for table in (self._tickets, self._requests, self._left):
            table.pop(request_id, None)  # type: ignore[attr-defined]

    def step(self) -> list[tuple[Ticket, RequestOutput | Exception]]:
        """Return what is due to each ticket after one step."""
        began = time.monotonic()
        try:
            outputs = self.scheduler.step()
        except Exception as error:
            logger.exception("the engine failed; its requests are run one by one")
            return self._run_apart(error)
        found = self._named(outputs)
        for ticket, _ in found:
            ticket.started = ticket.started or began
        return found

    def _named(self, outputs: Sequence[RequestOutput]) -> list[tuple[Ticket, RequestOutput | Exception]]:
        found: list[tuple[Ticket, RequestOutput | Exception]] = []
        for output in outputs:
            if output.request_id not in self._tickets:
                continue
            ticket, number = self._tickets[output.request_id]
            found.append((ticket, output._replace(request_id=number)))
            if output.finish_reason:
                self._left[output.request_id] -= 1
                if not self._left[output.request_id]:
                    self._forget(output.request_id)
        return found

    def _run_apart(self, error: Exception) -> list[tuple[Ticket, RequestOutput | Exception]]:
        """Run each request alone, so that the one which the engine fails with fails alone.

        Their texts begin again and are the same as before, so that what was streamed of them stays true.
        """
        found: list[tuple[Ticket, RequestOutput | Exception]] = []
        for request_id, request in list(self._requests.items()):
            self._restart()
            self.scheduler.add_request(request)
            try:
                while self.scheduler.has_unfinished:
                    found += self._named(self.scheduler.step())
            except Exception as again:
                found.append((self._tickets[request_id][0], EngineFailed(first_line(again))))
                self._forget(request_id)
        self._restart()
        return found


class Worker:
    """Run the requests of all models in one thread.

    It is ready once the programs are compiled that most requests need.
    """

    def __init__(
        self, models: Mapping[str, ServedModel], max_new_tokens: int, batch_size: int, stream_interval: int = 1
    ):
        self._models, self._max_new_tokens, self._batch_size = models, max_new_tokens, batch_size
        self._interval = stream_interval
        self._commands: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._runners = {name: self._make_runner(model, GREEDY, batch_size) for name, model in models.items()}
        self._beam_runners: OrderedDict[tuple[str, Sampling], _Runner] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._ready = threading.Event()
        self.failure: BaseException | None = None  # why the thread has ended
        self.unfinished = 0  # texts, known on the event loop

    @property
    def num_slots(self) -> int:
        return self._batch_size

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set() and self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step; called when no requests are left."""
        self._commands.put(("stop", None))
        self._thread.join(timeout=60)

    def join(self) -> None:
        """Wait for the end of the thread, by `stop` or a failure."""
        self._thread.join()

    # On the event loop

    @contextlib.asynccontextmanager
    async def submit(self, model: str, prompts: Sequence[Prompt]) -> AsyncIterator[Ticket]:
        """Give a ticket for prompts, whose requests are dropped when the block ends before they do."""
        ticket = Ticket(model, prompts, asyncio.get_running_loop())
        self.unfinished += ticket.texts
        self._commands.put(("add", ticket))
        try:
            yield ticket
        finally:
            self.unfinished -= ticket.texts
            ticket.aborted = True
            self._commands.put(("abort", ticket))

    def gauges(self) -> dict[str, dict[str, float]]:
        """Return the present values of vLLM's gauges, by model."""
        found: dict[str, dict[str, float]] = {
            name: dict.fromkeys(self._models, 0.0)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        runners = [*self._runners.items(), *((model, each) for (model, _), each in list(self._beam_runners.items()))]
        for model, runner in runners:
            running, waiting = runner.running_and_waiting
            found["num_requests_running"][model] += running
            found["num_requests_waiting"][model] += waiting
        for model, running in found["num_requests_running"].items():
            found["kv_cache_usage_perc"][model] = min(1.0, running / self._batch_size)
        return found

    # In the thread

    def _run(self) -> None:
        try:
            self._warm_up()
            self._ready.set()
            while self._take():
                for runner in self._all_runners():
                    if runner.is_busy:
                        self._deliver(runner.step())
        except BaseException as error:
            self.failure = error
            logger.exception("the worker has ended")

    def _all_runners(self) -> list[_Runner]:
        return [*self._runners.values(), *self._beam_runners.values()]

    def _take(self) -> bool:
        """Do what was submitted, waiting for it if there is nothing else to do. Return False when told to stop."""
        idle = not any(runner.is_busy for runner in self._all_runners())
        while True:
            try:
                command, ticket = self._commands.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if ticket is None:
                return False
            if command == "abort":
                for runner in self._all_runners():
                    runner.drop(ticket)
            elif not ticket.aborted:
                self._add(ticket)

    def _add(self, ticket: Ticket) -> None:
        tokenizer = self._models[ticket.model].run.tokenizer
        try:
            for number, prompt in enumerate(ticket.prompts):
                stop = StopStrings(prompt.stop, tokenizer.decode) if prompt.stop else None
                self._runner_of(ticket.model, prompt.sampling).add(ticket, number, stop)
        except Exception as error:
            for runner in self._all_runners():
                runner.drop(ticket)
            self._deliver([(ticket, error)])

    def _runner_of(self, model: str, sampling: Sampling) -> _Runner:
        """Return the runner for a kind of decoding; a beam search that was not asked for before is compiled."""
        if sampling.num_beams == 1:
            return self._runners[model]
        key = model, sampling
        if key not in self._beam_runners:
            if len(self._beam_runners) >= MAX_BEAM_ENGINES:
                idle = next((key for key, runner in self._beam_runners.items() if not runner.is_busy), None)
                if idle is None:
                    raise Overloaded("other kinds of beam search are running; try again later")
                del self._beam_runners[idle]
            slots = max(1, self._batch_size // sampling.num_beams)
            self._beam_runners[key] = self._make_runner(self._models[model], sampling, slots)
        self._beam_runners.move_to_end(key)
        return self._beam_runners[key]

    def _make_runner(self, served: ServedModel, sampling: Sampling, slots: int) -> _Runner:
        run = served.run
        engine = Engine(run.model, run.mesh, self._max_new_tokens, slots, sampling, chat.ends(run.tokenizer))
        return _Runner(engine, served.params, self._interval)

    def _warm_up(self) -> None:
        """Compile what most requests need."""
        for name, served in self._models.items():
            scheduler = self._runners[name].scheduler
            scheduler.add_request(Request(0, [served.run.tokenizer.end], 1))
            while scheduler.has_unfinished:
                scheduler.step()

    def _deliver(self, found: Sequence[tuple[Ticket, RequestOutput | Exception]]) -> None:
        """Hand outputs to their event loop, all of a step at once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, RequestOutput | Exception]]] = {}
        for ticket, item in found:
            by_loop.setdefault(ticket.loop, []).append((ticket, item))
        for loop, items in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: Sequence[tuple[Ticket, RequestOutput | Exception]]) -> None:
    for ticket, item in items:
        ticket.put(item)
