"""A function over many chunks, in order: in this process, in several, or on a Ray cluster.

Results come in the order of the chunks and a bounded number of chunks is under way, so memory does not grow with the
data, and what comes out does not depend on the number of workers.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from jax_it.errors import UserError, first_line

S = TypeVar("S")
T = TypeVar("T")
FEW = 8  # chunks that are done before the first process has started
CONNECT_TIMEOUT = 10.0  # seconds


class Workers:
    """Processes of this machine, or a Ray cluster's where its address is given; a context manager.

    With a number of 0 or 1 this process works alone. Others are started when there are more chunks than FEW, and stay
    for the next `map`; `option` is what sets their number, for the message that is shown when one is killed.
    """

    def __init__(self, number: int = 1, ray_address: str = "", option: str = "--num-workers"):
        self._number, self._option = number, option
        self._pool: ProcessPoolExecutor | None = None
        self._ray: Any = None
        if ray_address:
            self._ray, self._number = _connect(ray_address)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        if self._ray is not None:
            self._ray.shutdown()

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """Yield the function's result for each item, in order. Raises what the function raises."""
        if self._ray is not None:
            return self._on_ray(function, items)
        items = iter(items)
        first = list(islice(items, FEW + 1)) if self._number > 1 else []
        if len(first) <= FEW:
            return map(function, chain(first, items))
        return self._in_processes(function, chain(first, items))

    def _in_processes(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        if self._pool is None:
            # A forked process would inherit JAX's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._number, context, initializer=_start)
        # The function may hold much, such as an index: it is read once by each process, and not sent with each chunk.
        with tempfile.TemporaryDirectory(prefix="jax_it-") as folder:
            file = Path(folder) / "function.pickle"
            file.write_bytes(pickle.dumps(function))
            pending: deque[Future[T]] = deque()
            try:
                for item in items:
                    pending.append(self._pool.submit(_call, str(file), item))
                    if len(pending) > 2 * self._number:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            except BrokenProcessPool:
                raise UserError(
                    f"a worker process was killed, probably because memory ran out; lower {self._option}"
                ) from None
            finally:
                for future in pending:
                    future.cancel()

    def _on_ray(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        remote = self._ray.remote(_call_function)
        shared = self._ray.put(function)
        pending: deque[Any] = deque()
        for item in items:
            pending.append(remote.remote(shared, item))
            if len(pending) > 2 * self._number:
                yield self._result(pending.popleft())
        while pending:
            yield self._result(pending.popleft())

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None


def _connect(address: str) -> tuple[Any, int]:
    """Return the module ray, connected, and the number of the cluster's CPUs."""
    if not find_spec("ray"):
        raise UserError("--ray needs ray: pip install 'jax-it[ray]'")
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for a quarter of an hour, even where nothing listens
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
        os.environ.setdefault(
            "RAY_NUM_REDIS_GET_RETRIES", "1"
        )  # of 20, which take 40 s each where something else listens
        import ray

        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"--ray {address}: {reason}; give the address of a running cluster, or 'local'") from None
    return ray, max(1, int(ray.cluster_resources().get("CPU", 1)))


def _start() -> None:
    """Leave Ctrl-C to the main process, which ends the others, and one core to each process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers


@lru_cache(maxsize=1)
def _function(file: str) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pickle.loads(Path(file).read_bytes())
    return function


def _call(file: str, item: Any) -> Any:
    return _function(file)(item)


def _call_function(function: Callable[[S], T], item: S) -> T:
    return function(item)


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
