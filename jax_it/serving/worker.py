"""The threads that own engines and schedulers: what JAX does for requests is done here, one step at a time.

Each thread has one engine: a model's own, or that of a beam search, which has to be compiled for its number of beams.
On the event loop, `Workers.submit` gives a `Ticket` whose `outputs` come one by one, until its block ends. In the
thread, each turn takes what was submitted and dropped since the last one, and then makes a step.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from jax_it.errors import first_line
from jax_it.generation import Request, RequestOutput, Scheduler, StopStrings
from jax_it.generation.requests import GREEDY, Sampling
from jax_it.serving.constraints import SchemaConstraint
from jax_it.serving.engines import EngineOptions, Engines
from jax_it.serving.models import ServedModel

MAX_BEAM_WORKERS = 4  # beam searches of different settings at a time; the one used longest ago makes way

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
    constraint: SchemaConstraint | None = None


class EngineFailed(Exception):
    """Raised for a request that the engine failed with."""


class Overloaded(Exception):
    """Raised for a request that needs another engine, while all that there may be are busy."""


@dataclass(eq=False)
class Ticket:
    """A request under way: the prompts of one HTTP request. Its outputs arrive on the event loop that submitted it."""

    model: str
    prompts: Sequence[Prompt]
    loop: asyncio.AbstractEventLoop
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None  # when the step began that its first output came from
    dropped: bool = False
    queue: asyncio.Queue[RequestOutput | Exception] = field(default_factory=asyncio.Queue)

    @property
    def num_texts(self) -> int:
        return sum(prompt.sampling.num_samples for prompt in self.prompts)

    async def outputs(self, seconds: float, idle: float) -> AsyncIterator[RequestOutput | None]:
        """Yield outputs until every text has ended; `request_id` is the number of the prompt.

        Yields None whenever nothing has come for `idle` seconds. Raises TimeoutError once the request is older than
        `seconds`, and EngineFailed or whatever else was raised for this request.
        """
        left = self.num_texts
        while left:
            rest = self.arrived + seconds - time.monotonic()
            try:
                async with asyncio.timeout(min(rest, idle)):
                    item = await self.queue.get()
            except TimeoutError:
                if rest <= idle:
                    raise
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            left -= item.finish_reason is not None
            yield item


Found = list[tuple[Ticket, RequestOutput | Exception]]


class Worker:
    """One thread with one engine. It is ready once all programs are compiled that its requests can need.

    A beam search compiles its programs when they are first needed.
    """

    def __init__(self, served: ServedModel, sampling: Sampling, options: EngineOptions, engines: Engines):
        self._served, self._sampling, self._options, self._engines = served, sampling, options, engines
        self._commands: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._requests: dict[int, Request] = {}
        self._owners: dict[int, tuple[Ticket, int]] = {}  # of each request: its ticket and which of its prompts
        self._ended: dict[int, set[int]] = {}  # of each request: those of its samples that have ended
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"worker of {served.name}", daemon=True)
        self.scheduler: Scheduler | None = None
        self.failure: BaseException | None = None  # why it answers no requests any more

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set() and self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        return not self._requests and self._commands.empty()

    def start(self) -> "Worker":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Let the thread end after its present step."""
        self._commands.put(("stop", None))

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def put(self, command: str, ticket: Ticket) -> None:
        """Submit ("add") or drop ("drop") a ticket."""
        self._commands.put((command, ticket))
        if self.failure is not None:
            self._fail_all(self.failure)

    # In the thread

    def _run(self) -> None:
        try:
            with self._engines.open(self._served, self._sampling, self._options) as self._engine:
                self._restart()
                self._ready.set()
                while self._take():
                    if self._requests:
                        self._deliver(self._step())
        except BaseException as error:
            logger.exception("the worker of %s has ended", self._served.name)
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Answer all requests with an error, now and from now on: the thread has ended, or waits for ever."""
        self.failure = error
        self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Answer all that was submitted, as the thread has ended."""
        tickets = [ticket for ticket, _ in list(self._owners.values())]
        with contextlib.suppress(queue.Empty):
            while True:
                tickets += [ticket for ticket in self._commands.get_nowait()[1:] if ticket]
        self._deliver([(ticket, EngineFailed(first_line(error))) for ticket in dict.fromkeys(tickets)])

    def _restart(self) -> None:
        """Begin with empty slots; what is compiled stays."""
        engine = self._engine.load(self._served.params)
        if engine.num_beams == 1:
            engine.warm_up(self._options.max_prompt)
        self.scheduler = Scheduler(engine, self._options.stream_interval)

    def _take(self) -> bool:
        """Do what was submitted, waiting for it if there is nothing else to do. Return False when told to stop."""
        wait = not self._requests
        while True:
            try:
                command, ticket = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if ticket is None:
                return False
            if command == "drop":
                self._drop(ticket)
            elif not ticket.dropped:
                self._add(ticket)

    def _add(self, ticket: Ticket) -> None:
        assert self.scheduler
        decode = self._served.run.tokenizer.decode
        try:
            for number, prompt in enumerate(ticket.prompts):
                request = Request(
                    next(self._ids), prompt.tokens, prompt.max_new_tokens,
                    stop=StopStrings(prompt.stop, decode) if prompt.stop else None,
                    sampling=prompt.sampling if prompt.sampling.num_beams == 1 else None, index=prompt.index,
                    logprobs=prompt.logprobs, prompt_logprobs=prompt.prompt_logprobs, constraint=prompt.constraint,
                )  # fmt: skip
                self.scheduler.add_request(request)
                self._requests[request.request_id] = request
                self._owners[request.request_id] = ticket, number
                self._ended[request.request_id] = set()
        except Exception as error:
            self._drop(ticket)
            self._deliver([(ticket, error)])

    def _drop(self, ticket: Ticket) -> None:
        assert self.scheduler
        for request_id in [id for id, (owner, _) in self._owners.items() if owner is ticket]:
            self.scheduler.abort(request_id)
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        del self._requests[request_id], self._owners[request_id], self._ended[request_id]

    def _step(self) -> Found:
        """Return what is due to tickets after one step."""
        assert self.scheduler
        began = time.monotonic()
        try:
            found = self._with_owners(self.scheduler.step())
        except Exception:
            logger.exception("the engine failed; its requests are run one by one")
            found = self._run_apart()
        for ticket, _ in found:
            ticket.started = ticket.started or began
        return found

    def _with_owners(self, outputs: Sequence[RequestOutput]) -> Found:
        found: Found = []
        for output in outputs:
            if output.request_id not in self._owners:
                continue
            ticket, number = self._owners[output.request_id]
            found.append((ticket, output._replace(request_id=number)))
            if output.finish_reason:
                self._ended[output.request_id].add(output.sample)
                if len(self._ended[output.request_id]) == ticket.prompts[number].sampling.num_samples:
                    self._forget(output.request_id)
        return found

    def _run_apart(self) -> Found:
        """Run each request alone, so that the one which the engine fails with fails alone.

        Their texts begin again and are the same as before, so what was streamed of them stays true.
        """
        found: Found = []
        self._restart()
        for request_id, request in list(self._requests.items()):
            assert self.scheduler
            ticket, _ = self._owners[request_id]
            try:
                self.scheduler.add_request(request)
                while self.scheduler.has_unfinished:
                    outputs = [each for each in self.scheduler.step() if each.finish_reason]
                    found += self._with_owners([each for each in outputs if each.sample not in self._ended[request_id]])
            except Exception as error:
                found.append((ticket, EngineFailed(first_line(error))))
                self._forget(request_id)
                self._restart()
        return found

    def _deliver(self, found: Found) -> None:
        """Hand outputs to their event loops, all of a step at once."""
        by_loop: dict[asyncio.AbstractEventLoop, Found] = {}
        for ticket, item in found:
            by_loop.setdefault(ticket.loop, []).append((ticket, item))
        for loop, items in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: Found) -> None:
    for ticket, item in items:
        ticket.queue.put_nowait(item)


class Workers:
    """The workers of all models, and those of beam searches, which are made when they are first asked for."""

    def __init__(self, models: Mapping[str, ServedModel], options: EngineOptions):
        self._models, self.options = models, options
        self.engines = Engines()
        self._of_models = {name: Worker(served, GREEDY, options, self.engines) for name, served in models.items()}
        self._of_beams: OrderedDict[tuple[str, Sampling], Worker] = OrderedDict()

    def start(self) -> None:
        for worker in self._of_models.values():
            worker.start()

    def stop(self) -> None:
        """End the threads, which have no requests any more."""
        for worker in self._all():
            worker.stop()
        for worker in self._all():
            worker.join(60 if worker.failure is None else 0)

    def _all(self) -> list[Worker]:
        return [*self._of_models.values(), *self._of_beams.values()]

    @property
    def is_ready(self) -> bool:
        return all(worker.is_ready for worker in self._of_models.values())

    @property
    def failure(self) -> BaseException | None:
        """Why the server is of no use: a model's thread has ended, or one of several hosts."""
        failures = (worker.failure for worker in self._of_models.values() if worker.failure)
        return self.engines.failure or next(failures, None)

    def fail(self, error: BaseException) -> None:
        """Answer all requests with an error: the threads may wait for a host that is lost."""
        for worker in self._all():
            worker.fail(error)

    @contextlib.asynccontextmanager
    async def submit(self, model: str, prompts: Sequence[Prompt]) -> AsyncIterator[Ticket]:
        """Give a ticket for prompts, whose requests are dropped if the block ends before they do.

        Raises Overloaded for one kind of beam search too many.
        """
        worker = self._worker_for(model, prompts[0].sampling)
        ticket = Ticket(model, prompts, asyncio.get_running_loop())
        worker.put("add", ticket)
        try:
            yield ticket
        finally:
            ticket.dropped = True
            worker.put("drop", ticket)

    def _worker_for(self, model: str, sampling: Sampling) -> Worker:
        if sampling.num_beams == 1:
            return self._of_models[model]
        key = model, sampling
        if key in self._of_beams and self._of_beams[key].failure:
            del self._of_beams[key]
        if key not in self._of_beams:
            if len(self._of_beams) >= MAX_BEAM_WORKERS:
                idle = next((key for key, worker in self._of_beams.items() if worker.is_idle), None)
                if idle is None:
                    raise Overloaded("other kinds of beam search are running; try again later")
                self._of_beams.pop(idle).stop()
            self._of_beams[key] = Worker(self._models[model], sampling, self.options, self.engines).start()
        self._of_beams.move_to_end(key)
        return self._of_beams[key]

    def gauges(self) -> dict[str, dict[str, float]]:
        """Return the present values of vLLM's gauges, by model."""
        found: dict[str, dict[str, float]] = {
            name: dict.fromkeys(self._models, 0.0)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        workers = [*self._of_models.items(), *((name, worker) for (name, _), worker in self._of_beams.items())]
        for name, worker in workers:
            if scheduler := worker.scheduler:
                found["num_requests_running"][name] += scheduler.num_running
                found["num_requests_waiting"][name] += scheduler.num_waiting
                share = scheduler.num_running / max(1, self.options.batch_size)
                found["kv_cache_usage_perc"][name] = min(1.0, max(found["kv_cache_usage_perc"][name], share))
        return found
