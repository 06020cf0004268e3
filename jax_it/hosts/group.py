"""The connections of a run's processes: barriers over them, and what becomes of one when another ends."""

import ctypes
import json
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from jax_it.errors import Interrupted, UserError, exit_now
from jax_it.hosts.surroundings import LOST_AFTER, Place, seconds

GRACE = 20.0  # seconds that this process has to end by itself when another one has ended
GO_ON = "run the same command on all hosts to continue from the last checkpoint"


class Connection:
    """Messages over a socket, a line of JSON each."""

    def __init__(self, stream: socket.socket):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = stream
        self.heard = time.monotonic()
        self._sending = threading.Lock()
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Sends a message, to one who may have gone."""
        with self._sending, suppress(OSError):
            self.stream.sendall(json.dumps(message).encode() + b"\n")

    def receive_one(self, timeout: float) -> dict[str, Any]:
        """The next message. Raises OSError where none comes, ValueError where it is none."""
        self.stream.settimeout(timeout)
        while b"\n" not in self._rest:
            part = self.stream.recv(1 << 16)
            if not part:
                raise ConnectionResetError("it has closed the connection")
            self._rest += part
            if len(self._rest) > 1 << 22:
                raise ValueError("no message")
        line, self._rest = self._rest.split(b"\n", 1)
        self.stream.settimeout(30)  # of sending
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no message")
        return message

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come in, when something has; None where the other side is gone."""
        try:
            part = self.stream.recv(1 << 16)
        except OSError:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + part).split(b"\n")
        return [json.loads(line) for line in lines] if part or lines else None

    def closed(self) -> bool:
        """Whether the other side is gone, of one that is to say nothing now."""
        return bool(select.select([self.stream], [], [], 0)[0])


@dataclass(frozen=True)
class End:
    """That a process has ended before the run: which, why and with what exit code."""

    index: int
    reason: str
    code: int


class Group:
    """This process among the others, from the start to the end."""

    def __init__(self, place: Place, connections: dict[int, Connection]):
        self.place = place
        self._connections = connections
        self._changed = threading.Condition()
        self._rounds: Counter[str] = Counter()
        self._at: dict[str, dict[int, bool]] = {}  # process 0: who has come to a barrier, and said yes there
        self._through: dict[str, bool] = {}  # barriers that all have come to: whether all said yes
        self._shared: deque[str] = deque()
        self._left: set[int] = set()  # those that have ended well
        self._end: End | None = None
        self._noticed = False

    def barrier(self, name: str, yes: bool = True) -> bool:
        """Whether all said yes."""
        self._rounds[name] += 1
        key = f"{name} {self._rounds[name]}"
        if self.place.index == 0:
            self._arrive(key, 0, yes)
        else:
            self._connections[0].send(at=key, yes=yes)
        self._wait_until(lambda: key in self._through)
        return self._through.pop(key)

    def share(self, text: str) -> None:
        for connection in self._connections.values():
            connection.send(shared=text)

    def receive_shared(self) -> str:
        self._wait_until(lambda: bool(self._shared))
        return self._shared.popleft()

    def _wait_until(self, true: Callable[[], bool]) -> None:
        with self._changed:
            while not true():
                if self._end or self._left:
                    raise self.error()
                self._changed.wait(1)

    def end(self, reason: str, code: int) -> None:
        """Tells the others that this process ends before its time."""
        with self._changed:
            self._noticed = True
            if self._end is None:
                self._end = End(self.place.index, reason, code)
                self._tell()

    def leave(self) -> None:
        """Tells the others that this process ends well."""
        with self._changed:
            self._noticed = True
        for connection in self._connections.values():
            connection.send(left=self.place.index)

    def wait_for_end(self, seconds: float) -> bool:
        """Whether another process has ended, or does so in the next seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._end is not None, seconds)

    def error(self) -> Exception:
        """What the end of another process means for this one."""
        with self._changed:
            self._noticed = True
            end = self._end or End(min(self._left, default=0), "has ended", 75)
        name = self.place.name(end.index)
        if end.code == 2:
            return UserError(f"host {name}: {end.reason}")
        if end.code == 1:
            return Interrupted(f"host {name} has failed: {end.reason}, which its own log shows; {GO_ON}")
        return Interrupted(f"host {name} {end.reason}; {GO_ON}")

    def watch(self) -> None:
        """Reads what the others say, in a thread; ends the process if it does not end by itself when it should."""
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                connection.heard = time.monotonic()
                selector.register(connection.stream, selectors.EVENT_READ, index)
            limit = seconds(LOST_AFTER)
            spoken, ended = 0.0, 0.0
            while True:
                for key, _ in selector.select(timeout=min(1, limit / 4)):
                    messages = self._connections[key.data].receive()
                    if messages is None:
                        selector.unregister(key.fileobj)
                        if key.data not in self._left:
                            self._lose(key.data, "was lost: its process ended without a word")
                    for message in messages or ():
                        self._hear(key.data, message)
                now = time.monotonic()
                if now > spoken + limit / 4:
                    for connection in self._connections.values():
                        connection.send()
                    spoken = now
                for index, connection in self._connections.items():
                    if index not in self._left and now > connection.heard + limit:
                        self._lose(index, f"was lost: nothing was heard of it for {limit:.0f} s")
                if self._end and self._end.index != self.place.index:
                    ended = ended or now
                    # The main thread may wait in a collective that never ends, or be slow to leave.
                    if now > ended + (GRACE if not self._noticed else 4 * GRACE):
                        self.exit()

    def exit(self) -> NoReturn:
        """Ends this process because of another one's end."""
        error = self.error()
        print(f"jax-it: {' '.join(str(error).split())}", file=sys.stderr)
        exit_now(2 if isinstance(error, UserError) else 75)

    def _hear(self, index: int, message: dict[str, Any]) -> None:
        if "at" in message:
            self._arrive(message["at"], index, message["yes"])
        with self._changed:
            if "through" in message:
                self._through[message["through"]] = message["yes"]
            if "shared" in message:
                self._shared.append(message["shared"])
            if "left" in message:
                self._left.add(index)
            self._changed.notify_all()
        if "ended" in message:
            self._lose(message["ended"], message["reason"], message["code"])

    def _arrive(self, key: str, index: int, yes: bool) -> None:
        """Process 0: notes who has come to a barrier, and lets all through."""
        with self._changed:
            come = self._at.setdefault(key, {})
            come[index] = yes
            if len(come) < self.place.count:
                return
            del self._at[key]
            self._through[key] = all(come.values())
            self._changed.notify_all()
            for connection in self._connections.values():
                connection.send(through=key, yes=self._through[key])

    def _lose(self, index: int, reason: str, code: int = 75) -> None:
        with self._changed:
            if self._end is None and index != self.place.index:
                self._end = End(index, reason, code)
                self._changed.notify_all()
                self._tell()

    def _tell(self) -> None:
        """Passes the end on: process 0 to all, the others to it."""
        assert self._end is not None
        for connection in self._connections.values():
            connection.send(ended=self._end.index, reason=self._end.reason, code=self._end.code)


_on_abort: list[Any] = []  # the handler, which C holds on to


def explain_aborts(group: Group) -> None:
    """Has an abort of JAX's runtime, which ends every process when process 0 is gone, say what ours would."""

    def explain(number: int) -> None:
        if group.wait_for_end(5):
            group.exit()
        libc.signal(number, ctypes.c_void_p(0))  # another fault: as if this were not here

    libc = ctypes.CDLL(None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    _on_abort.append(handler)
    libc.signal(int(signal.SIGABRT), handler)
