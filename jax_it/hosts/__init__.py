"""Start the processes of a run together, make them wait for each other, and end all of them when one ends early.

Barriers and shared values use the key-value store of JAX's coordination client. `connections` does what that client
cannot do, and says what was measured.
"""

import atexit
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jax_it.errors import Interrupted, UserError, exit_now, first_line
from jax_it.hosts.cluster_env import LOST_AFTER_VAR, START_TIMEOUT_VAR, detect, seconds
from jax_it.hosts.connections import Connections, connect

_NOTICE = 10.0  # seconds between an error in JAX and the news of the lost process that caused it
_connections: Connections | None = None
_rounds = itertools.count()  # every process makes the same calls in the same order


def _state() -> Any:
    """Return JAX's client and its numbers. Importing JAX takes a second, which the data tools do without."""
    from jax._src import distributed

    return distributed.global_state


def start() -> None:
    """Join this process with the others of the run, if its environment says that there are others.

    Does nothing when called again, in a process that has called `jax.distributed.initialize` itself, and when there
    is only one process. Must be called before anything that touches devices. Raises Interrupted, naming the hosts
    that did not come in time.
    """
    global _connections
    import jax

    if _connections is not None or jax.distributed.is_initialized():
        return
    env = detect()
    if env is None or env.num_processes == 1:
        return
    _connections = connect(env, time.monotonic() + seconds(START_TIMEOUT_VAR))
    atexit.register(_connections.leave)  # runs before JAX's own handler, which waits for all processes
    # Nothing is left for JAX to detect: under Slurm it would take one GPU of many.
    jax.distributed.initialize(
        env.coordinator_address, env.num_processes, env.process_id, env.local_device_ids,
        cluster_detection_method="deactivate",
        # `connections` must notice a silent host first: JAX's heartbeats end the process without naming it.
        heartbeat_timeout_seconds=int(max(100, 3 * seconds(LOST_AFTER_VAR))),
    )  # fmt: skip
    _connections.explain_aborts()


def is_first() -> bool:
    """Return whether this process writes what all share: the run directory, logs, reports."""
    if _connections is not None:
        return _connections.env.process_id == 0
    return bool(_state().process_id == 0)


def barrier(name: str) -> None:
    """Wait until all processes of the run have reached this call. Raises if one of them has ended.

    `name` shows up in JAX's error messages.
    """
    _all_agree(name, True)


def all_agree(yes: bool) -> bool:
    """Return whether all processes say yes; each of them must ask. Raises if one of them has ended."""
    return _all_agree("agree", yes)


def _all_agree(name: str, yes: bool) -> bool:
    client = _state().client
    if client is None:
        return yes
    key = f"jax_it/{next(_rounds)}/{name}"
    client.key_value_increment(f"{key}/yes", int(yes))
    count = _state().num_processes
    if client.key_value_increment(f"{key}/arrived", 1) == count:  # the last one to arrive tells all
        client.key_value_set(f"{key}/all", str(client.key_value_increment(f"{key}/yes", 0) == count))
    return _wait_for(f"{key}/all") == "True"


def from_first(make: Callable[[], str]) -> str:
    """Return on every process what `make` returns on the first one, which alone calls it."""
    client = _state().client
    if client is None:
        return make()
    key = f"jax_it/{next(_rounds)}/shared"
    if not is_first():
        return json.loads(_wait_for(key))
    with _failing_together():
        made = make()
    client.key_value_set(key, json.dumps(made))  # ASCII: names of files may not be valid UTF-8
    return made


def _wait_for(key: str) -> str:
    """Return the value of a key as soon as a process has set it. Raises if another process has ended.

    It asks once a second: JAX's client can be interrupted neither in `wait_at_barrier` nor while it waits for a key.
    """
    import jax

    client = _state().client
    while True:
        try:
            return client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if _connections is not None:
                _connections.check()
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def send_to_others(message: bytes) -> None:
    """Send a message from the first process to all others, which is there for their `receive` at once and in order."""
    assert _connections
    _connections.send_bytes(message)


def receive() -> bytes:
    """Wait on another process for the next message of the first one. Raises if a process has ended."""
    assert _connections
    return _connections.receive_bytes()


def ended_early() -> Exception | None:
    """Return what the early end of another process means for this one: UserError or Interrupted. None: all run."""
    if _connections is not None and _connections.wait_for_end(0):
        return _connections.error()
    return None


@contextmanager
def first_then_others() -> Iterator[None]:
    """Run the block on the first process and then on the others, which find what it has made on a shared disk.

    If it raises on the first process, the others raise as well.
    """
    if not is_first():
        barrier("first")
        yield
        return
    with _failing_together():
        yield
    barrier("first")


@contextmanager
def _failing_together() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if _connections is not None:
            _connections.end(first_line(error), 2 if isinstance(error, UserError) else 1)
        raise


@contextmanager
def watched() -> Iterator[None]:
    """Turn an error of JAX's within the block into Interrupted if the end of another process caused it."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        if _connections is not None and _connections.wait_for_end(_NOTICE):
            raise _connections.error() from error
        raise


def leave(code: int, message: str = "") -> NoReturn:
    """End this process with an exit code; if it is not 0, the others end as well and report the message."""
    if _connections is None:
        sys.exit(code)
    if code == 0:
        barrier("end")  # the first process may still be writing for longer than JAX would wait
        sys.exit(0)
    _connections.end(message, code)
    _connections.wait_for_others()
    exit_now(code)  # JAX's own shutdown would wait for all processes
