"""The engines of a server, on one host or on several that serve as one.

The devices of all hosts are one mesh, so that each host has to run the same programs in the same order. The first host
answers requests and decides what to run: it sends every call of an engine to the others before it makes the call, and
they repeat it in `follow`.
"""

import contextlib
import itertools
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax

from jax_it import hosts
from jax_it.data import chat
from jax_it.generation import Engine
from jax_it.generation.requests import Sampling
from jax_it.models import Params
from jax_it.serving.models import ServedModel
from jax_it.serving.schemas import MAX_LOGPROBS

PREFIX_CACHE_BYTES = 1 << 28  # for keys and values of shared beginnings of prompts, of each model
ON_THIS_HOST = ("block_until_ready", "extend_sizes", "lower", "prefill_sizes")  # methods that change no device's state


@dataclass(frozen=True)
class EngineOptions:
    """What engines are made for."""

    max_new_tokens: int
    max_prompt: int  # tokens
    batch_size: int = 32
    stream_interval: int = 1


def make_engine(served: ServedModel, sampling: Sampling, options: EngineOptions) -> Engine:
    """Make an engine of a model, without weights. Raises as `Engine` does."""
    run, beams = served.run, sampling.num_beams
    return Engine(
        run.model, run.mesh, options.max_new_tokens, max(1, options.batch_size // beams), sampling,
        chat.ends(run.tokenizer),
        max_logprobs=0 if beams > 1 else min(MAX_LOGPROBS, run.model.config.vocab_size),
        prefix_cache_bytes=PREFIX_CACHE_BYTES,
    )  # fmt: skip


class Engines:
    """Open the engines of a server; of several hosts, on the first one.

    An error in a call on several hosts is final: which programs the others have run is not known then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # gives the calls of all engines one order
        self._numbers = itertools.count()
        self._failure: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """Return why no engine can be used any more: a call on several hosts has failed, or a host has ended."""
        return self._failure or hosts.ended_early()

    @contextlib.contextmanager
    def open(self, served: ServedModel, sampling: Sampling, options: EngineOptions) -> Iterator[Engine]:
        """Give an engine without weights to the block, and free what the other hosts have of it afterwards."""
        engine = make_engine(served, sampling, options)
        if jax.process_count() == 1:
            yield engine
            return
        number = next(self._numbers)
        with self.call(number, "open", served.name, sampling, options):
            shared = _SharedEngine(self, number, engine)
        yield cast(Engine, shared)
        with self.call(number, "close"):
            pass

    @contextlib.contextmanager
    def call(self, number: int, name: str, *arguments: Any, **settings: Any) -> Iterator[None]:
        """Let the other hosts call a method of an engine; this one calls it in the block."""
        with self._lock:
            if failure := self.failure:
                raise failure
            hosts.send_to_others(pickle.dumps((number, name, arguments, settings)))
            try:
                yield
            except BaseException as error:
                self._failure = error
                raise

    def end(self) -> None:
        """Let the other hosts end as well. No engine can be used afterwards."""
        if jax.process_count() > 1:
            with self.call(-1, "end"):
                self._failure = RuntimeError("the server has ended")


class _SharedEngine:
    """An engine whose methods all hosts call; everything else is that of the first host's engine."""

    def __init__(self, engines: Engines, number: int, engine: Engine):
        self._engines, self._number, self._engine = engines, number, engine

    def load(self, params: Params) -> "_SharedEngine":
        with self._engines.call(self._number, "load"):  # the others have weights of their own
            return _SharedEngine(self._engines, self._number, self._engine.load(params))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._engine, name)
        if not callable(value) or name in ON_THIS_HOST:
            return value

        def call_on_all(*arguments: Any, **settings: Any) -> Any:
            with self._engines.call(self._number, name, *arguments, **settings):
                return _call(self._engine, name, arguments, settings)

        return call_on_all


def follow(models: Mapping[str, ServedModel]) -> None:
    """Repeat the calls of the first host's engines until it lets this host end.

    A signal to stop is ignored, since it comes to all hosts, and the first one still has requests to answer. Raises if
    another host has ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    opened: dict[int, tuple[Engine, ServedModel]] = {}
    loaded: dict[int, Engine] = {}
    while True:
        number, name, arguments, settings = pickle.loads(hosts.receive())
        if name == "end":
            return
        if name == "open":
            served = models[arguments[0]]
            opened[number] = make_engine(served, *arguments[1:]), served
        elif name == "load":
            engine, served = opened[number]
            loaded[number] = engine.load(served.params)
        elif name == "close":
            del opened[number], loaded[number]
        else:
            _call(loaded[number], name, arguments, settings)


def _call(engine: Engine, name: str, arguments: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    result = getattr(engine, name)(*arguments, **settings)
    if jax.default_backend() == "cpu":  # it may run programs of two engines in another order than they were called in
        engine.block_until_ready()
    return result
