"""Work shared among processes, whose results come in order."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Any, TypeVar

from jax_it.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_function: Callable[[Any], Any]  # of a worker


def in_order(function: Callable[[T], R], items: Iterator[T], num_workers: int) -> Iterator[R]:
    """Yield the function's result for each item, computed by that many processes; 0: by this one alone.

    At most two items for each process wait or are worked on. Raises what the function raises, and UserError for a
    process that is killed.
    """
    first = next(items, None)
    second = next(items, None)
    given = chain([item for item in (first, second) if item is not None], items)
    if not num_workers or second is None:  # processes take seconds to start
        yield from map(function, given)
        return
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    pool = ProcessPoolExecutor(num_workers, context, _start, (function,))
    waiting: deque[Future[R]] = deque()
    try:
        for item in given:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenizes was killed, perhaps for want of memory; lower config.data.num_workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the tokenizer: the processes are as many as the cores


def _call(item: Any) -> Any:
    return _function(item)
