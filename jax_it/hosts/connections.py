"""Connect process 0 with all others over TCP, to name a host that is missing at the start or lost later.

JAX's coordination client does not do this. Measured on JAX 0.10.2 and 0.12.0, with two and three processes:

- A start that times out ends every process with SIGABRT (exit code -6) inside `jax.distributed.initialize`; which
  process was missing is said at most in the C++ log. A `missed_heartbeat_callback`, which would replace the abort,
  cannot be given: its argument cannot be converted to Python (`std::bad_cast`).
- A killed process is noticed only when its heartbeats time out (after 3 to 5 s with a timeout of 4 s; the default is
  100 s). Until then `wait_at_barrier` and `get_live_nodes` wait as well. A closed connection is noticed within 0.1 s.
- That timeout aborts all other processes, and within 0.1 s so does the death of process 0. A handler of SIGABRT can
  set the exit code, but `wait_at_barrier`, called there, never returned: the handler must know who was lost already.

So these connections carry heartbeats and the reason why a process ends early. Their messages are lines of JSON. After
some of them come bytes from process 0: JAX's key-value store would keep them all until they are deleted.
"""

import ctypes
import json
import queue
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from jax_it.errors import Interrupted, UserError, exit_now, first_line
from jax_it.hosts.cluster_env import LOST_AFTER_VAR, RUN_ALONE, ClusterEnv, seconds

GRACE = 20.0  # seconds that this process has to end by itself when another one has ended
GO_ON = "run the same command on all hosts to go on; training continues from its last checkpoint"
_MAX_LINE = 1 << 22  # bytes; the longest one has the names of all hosts


class Connection:
    """Send and receive dicts over a socket, each as a line of JSON."""

    def __init__(self, stream: socket.socket):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or a message waits for the last one's receipt
        self.stream = stream
        self._reader = stream.makefile("rb")

    def send(self, payload: bytes = b"", **message: Any) -> None:
        """Send a message, and bytes after it; it does not matter if the other side is gone."""
        with suppress(OSError):
            self.stream.sendall(json.dumps(message).encode() + b"\n" + payload)

    def receive(self, timeout: float) -> dict[str, Any]:
        """Return the next message.

        Raises TimeoutError or another OSError if none comes, ValueError if what comes is not a message.
        """
        self.stream.settimeout(timeout)
        line = self._reader.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("it has closed the connection")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def receive_bytes(self, number: int) -> bytes:
        """Return as many bytes as the last message has after it. Raises as `receive` does."""
        payload = self._reader.read(number)
        if len(payload) < number:
            raise ConnectionResetError("it has closed the connection")
        return payload


@dataclass(frozen=True)
class End:
    """The end of a process before that of the run: which process, why, and its exit code."""

    process_id: int
    reason: str
    code: int


class Connections:
    """Hold this process's connections, to process 0 or from process 0 to all others, until it ends."""

    def __init__(self, env: ClusterEnv, connections: dict[int, Connection]):
        self.env = env
        self._connections = connections
        self._lock = threading.RLock()  # of the fields below and of sending
        self._end: End | None = None  # the first one, which may be this process's own
        self._left: set[int] = set()  # processes that have ended with the run
        self._other_ended = threading.Event()
        self._payloads: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # from process 0
        threads = {index: threading.Thread(target=self._listen, args=(index,), daemon=True) for index in connections}
        self._listeners = threads.values()
        for thread in (*self._listeners, threading.Thread(target=self._send_heartbeats, daemon=True)):
            thread.start()

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(seconds(LOST_AFTER_VAR) / 4)
            self._send()

    def _send(self, payload: bytes = b"", **message: Any) -> None:
        with self._lock:
            for connection in self._connections.values():
                connection.send(payload, **message)

    def send_bytes(self, payload: bytes) -> None:
        """Send bytes from process 0 to all others, whatever they do just now."""
        self._send(payload, bytes=len(payload))

    def receive_bytes(self) -> bytes:
        """Wait for the next bytes of process 0. Raises if a process has ended."""
        while True:
            with suppress(queue.Empty):
                return self._payloads.get(timeout=1)
            self.check()

    def _listen(self, index: int) -> None:
        """Receive what a process sends until it leaves or is lost."""
        limit = seconds(LOST_AFTER_VAR)
        try:
            while True:
                message = self._connections[index].receive(limit)
                if "left" in message:
                    self._left.add(index)
                    return
                if "bytes" in message:
                    self._payloads.put(self._connections[index].receive_bytes(message["bytes"]))
                if "reason" in message:
                    self._note(End(**message))
        except TimeoutError:
            self._note(End(index, f"was lost: nothing was heard of it for {limit:.0f} s", 75))
        except (OSError, ValueError):
            self._note(End(index, "was lost: its process ended without giving a reason", 75))

    def _note(self, end: End) -> None:
        """Note and pass on the first end; process 0 passes it to all, the others to process 0."""
        with self._lock:
            if self._end is not None:
                return
            self._end = end
            if end.process_id != self.env.process_id:
                self._other_ended.set()
                # The main thread may wait in a collective that never ends, or be slow to leave.
                timer = threading.Timer(GRACE, self._exit)
                timer.daemon = True
                timer.start()
            self._send(**vars(end))

    def end(self, reason: str, code: int) -> None:
        """Tell the others that this process ends early."""
        self._note(End(self.env.process_id, reason, code))

    def leave(self) -> None:
        """Tell the others that this process ends with the run."""
        self._send(left=True)

    def wait_for_others(self) -> None:
        """Wait on process 0, for 3 s at most, until the others have ended: JAX aborts them if its coordinator goes."""
        until = time.monotonic() + 3
        for thread in self._listeners if self.env.process_id == 0 else ():
            thread.join(max(until - time.monotonic(), 0))

    def wait_for_end(self, timeout: float) -> bool:
        """Return whether another process has ended early, or does so within the next `timeout` seconds."""
        return self._other_ended.wait(timeout)

    def check(self) -> None:
        """Raise if a process that this one would wait for has ended."""
        if self._end or self._left:
            raise self.error()

    def error(self) -> Exception:
        """Return what the end of another process means for this one: UserError or Interrupted."""
        end = self._end or End(min(self._left), "has ended", 75)
        name = self.env.name(end.process_id)
        if end.code == 2:
            return UserError(f"host {name}: {end.reason}")
        if end.code == 1:
            return Interrupted(f"host {name} has failed: {end.reason}, which its own log shows; {GO_ON}")
        return Interrupted(f"host {name} {end.reason}; {GO_ON}")

    def _exit(self) -> NoReturn:
        """End this process because another one has ended."""
        error = self.error()
        print(f"jax-it: {' '.join(str(error).split())}", file=sys.stderr)
        exit_now(2 if isinstance(error, UserError) else 75)

    def explain_aborts(self) -> None:
        """Make an abort by JAX's coordination client end this process as the loss of the other process would."""

        def explain(number: int) -> None:
            if self.wait_for_end(5):
                self._exit()
            libc.signal(number, ctypes.c_void_p(0))  # another fault: end as without this handler

        libc = ctypes.CDLL(None)
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)  # C keeps no reference
        libc.signal(int(signal.SIGABRT), self._handler)


def connect(env: ClusterEnv, until: float) -> Connections:
    """Wait for all processes of the run until a time of `time.monotonic`, and return this one's connections.

    All connect to process 0 at the coordinator's address, where JAX's coordinator listens afterwards. Raises
    Interrupted, naming the hosts that have not come.
    """
    connections, names = _accept_all(env, until) if env.process_id == 0 else _join(env, until)
    return Connections(replace(env, names=names), connections)


def _accept_all(env: ClusterEnv, until: float) -> tuple[dict[int, Connection], dict[int, str]]:
    """Return process 0's connections to all others, and the names of the hosts."""
    names = {**env.names, 0: socket.gethostname()}
    joined: dict[int, Connection] = {}
    started, told = time.monotonic(), 0.0
    with _open_server(int(env.coordinator_address.rsplit(":", 1)[1]), until) as server:
        while len(joined) < env.num_processes - 1:
            missing = [index for index in range(1, env.num_processes) if index not in joined]
            listed = ", ".join([env.name(index) for index in missing[:8]] + ["…"] * (len(missing) > 8))
            now = time.monotonic()
            if now > until:
                limit = f"within {now - started:.0f} s"
                text = f"{listed} did not come {limit}, of {env.num_processes} processes; {RUN_ALONE}"
                for connection in joined.values():
                    connection.send(error=text)
                raise Interrupted(text)
            if now > started + 15 and now > told + 60:
                print(f"waiting for {listed} of {env.num_processes} processes", file=sys.stderr, flush=True)
                told = now
            for index, connection in list(joined.items()):
                if select.select([connection.stream], [], [], 0)[0]:  # closed: it says nothing before it is answered
                    del joined[index]  # it has died, and may come again
            # No process within the last second, or something that is not a process of a run.
            with suppress(OSError, ValueError, TypeError, KeyError):
                connection = Connection(server.accept()[0])
                hello = connection.receive(5)
                if hello.get("count") != env.num_processes or not 0 < hello.get("process", 0) < env.num_processes:
                    text = f"this process is one of {hello.get('count')}, process 0 of {env.num_processes}"
                    connection.send(error=text)
                    continue
                joined[hello["process"]] = connection
                names[hello["process"]] = hello["host"]
    for connection in joined.values():
        connection.send(names=[names[index] for index in range(env.num_processes)])
    return joined, names


def _open_server(port: int, until: float) -> socket.socket:
    while True:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
            server.settimeout(1)
            return server
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(f"cannot listen on port {port}: {error.strerror}; stop what uses it") from None
            time.sleep(1)  # the previous run may be about to end


def _join(env: ClusterEnv, until: float) -> tuple[dict[int, Connection], dict[int, str]]:
    """Return another process's connection to process 0, and the names of the hosts."""
    address = env.coordinator_address
    host, port = address.rsplit(":", 1)
    while True:
        try:
            connection = Connection(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            connection.send(process=env.process_id, count=env.num_processes, host=socket.gethostname())
            answer = connection.receive(max(until - time.monotonic(), 0) + 10)
        except (OSError, ValueError) as error:  # it is not there yet, or the previous run still is
            if time.monotonic() > until:
                text = f"{env.name(0)} at {address} did not answer in time ({first_line(error)}); {RUN_ALONE}"
                raise Interrupted(text) from None
            time.sleep(0.5)
            continue
        if "error" in answer:
            raise Interrupted(answer["error"])
        return {0: connection}, dict(enumerate(answer["names"]))
