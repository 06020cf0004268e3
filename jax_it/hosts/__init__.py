"""The processes of a run on several hosts: how they start together, wait for each other, and learn of each other's end.

Before JAX's own coordination begins, every process connects to process 0 at the coordinator's address, so
that one that is missing can be named. These connections stay open beside JAX's: a process that dies closes
its own, and all others end within seconds and say so, where JAX's would wait for heartbeats or abort.
"""

import atexit
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax

from jax_it.errors import Interrupted, UserError, exit_now, first_line
from jax_it.hosts.group import Group, explain_aborts
from jax_it.hosts.rendezvous import meet
from jax_it.hosts.surroundings import LOST_AFTER, START_TIMEOUT, find_place, seconds

_NOTICE = 10.0  # seconds in which an error of JAX's and the end that caused it come together
_group: Group | None = None


def start() -> None:
    """Joins this process with the others of the run, where its surroundings say that there are others.

    Nothing happens the second time, in a process that has called `jax.distributed.initialize` itself, and
    where there is one process. Must come before anything that touches devices. Raises Interrupted that
    names the hosts which do not come in time.
    """
    global _group
    if _group is not None or jax.distributed.is_initialized():
        return
    place = find_place()
    if place is None or place.count == 1:
        return
    _group = meet(place, time.monotonic() + seconds(START_TIMEOUT))
    atexit.register(_group.leave)  # before JAX's own, which waits for all
    # Everything is given, so that JAX detects nothing by itself: under Slurm it would take one GPU of many.
    jax.distributed.initialize(
        place.address, place.count, place.index, place.devices,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=int(max(100, 3 * seconds(LOST_AFTER))),  # ours is to come first
    )  # fmt: skip
    explain_aborts(_group)


def is_first() -> bool:
    """Whether this process writes what all share: the run's folder, logs, reports."""
    if _group is not None:
        return _group.place.index == 0
    return not jax.distributed.is_initialized() or jax.process_index() == 0  # without waking devices for nothing


def barrier(name: str) -> None:
    """Returns when all processes of the run have come here. Raises where one of them has ended."""
    if _group is not None:
        _group.barrier(name)
    elif jax.distributed.is_initialized():  # by the caller
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextmanager
def first_then_others() -> Iterator[None]:
    """The block runs on the first process, then on the others, which find what it has made on a shared disk.

    Where it raises on the first, the others raise as well.
    """
    if is_first():
        try:
            yield
        except BaseException as error:
            if _group is not None:
                _group.end(first_line(error), 2 if isinstance(error, UserError) else 1)
            raise
        barrier("first")
    else:
        barrier("first")
        yield


def all_agree(yes: bool) -> bool:
    """Whether all processes say yes; each must ask. Raises where one of them has ended."""
    if _group is not None:
        return _group.barrier("agree", yes)
    if jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(jax.numpy.array(yes)).all())
    return yes


def from_first(make: Callable[[], str]) -> str:
    """What `make` returns on the first process, which alone calls it, where they were started by `start`."""
    if _group is None:
        return make()
    if not is_first():
        return _group.receive_shared()
    try:
        made = make()
    except BaseException as error:
        _group.end(first_line(error), 2 if isinstance(error, UserError) else 1)
        raise
    _group.share(made)
    return made


@contextmanager
def watched() -> Iterator[None]:
    """Turns an error of JAX's within into Interrupted, where it came from the end of another process."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        if _group is not None and _group.wait_for_end(_NOTICE):
            raise _group.error() from error
        raise


def leave(code: int, message: str = "") -> NoReturn:
    """Ends this process with an exit code; where it is not 0, the others of the run end as well and say why."""
    if _group is None:
        sys.exit(code)
    if code == 0:
        _group.barrier("end")  # what the first one still writes may take longer than JAX waits
        sys.exit(0)
    _group.end(message, code)
    exit_now(code)  # JAX's own end would wait for all processes
