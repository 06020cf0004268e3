"""The processes of a run on several hosts: how they start together, wait for each other, and learn of each other's end.

Before JAX's own coordination begins, every process connects to process 0 at the coordinator's address, so
that one that is missing can be named. These connections stay open beside JAX's: a process that dies closes
its own, and all others end within seconds and say so, where JAX's would wait for heartbeats or abort.
"""

import atexit
import ctypes
import importlib.util
import json
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax

from jax_it.errors import Interrupted, UserError

START_TIMEOUT = "JAX_IT_START_TIMEOUT"  # seconds that a start waits for hosts that are missing
LOST_AFTER = "JAX_IT_LOST_AFTER"  # seconds after which a silent host is lost; one whose process ends is at once
_DEFAULTS = {START_TIMEOUT: 600.0, LOST_AFTER: 60.0}
_GRACE = 20.0  # seconds that this process has to end by itself when another one has ended
_NOTICE = 10.0  # seconds in which an error of JAX's and the end that caused it come together
GO_ON = "the same command on all hosts goes on from the last checkpoint"


@dataclass(frozen=True)
class Place:
    """Which process of which run this is."""

    index: int
    count: int
    address: str  # HOST:PORT of process 0
    names: dict[int, str] = field(default_factory=dict)  # of the hosts, as far as they are known beforehand
    devices: list[int] | None = None  # this process's, where several share a host

    def name(self, index: int) -> str:
        known = self.names.get(index)
        return f"{known} (process {index})" if known else f"process {index}"


_group: "_Group | None" = None


def start() -> None:
    """Joins this process with the others of the run, where its surroundings say that there are others.

    Nothing happens the second time, in a process that has called `jax.distributed.initialize` itself, and
    where there is one process. Must come before anything that touches devices. Raises Interrupted that
    names the hosts which do not come in time.
    """
    global _group
    if _group is not None or jax.distributed.is_initialized():
        return
    place = surroundings()
    if place is None or place.count == 1:
        return
    _group = _meet(place, time.monotonic() + _seconds(START_TIMEOUT))
    atexit.register(_group.leave)  # before JAX's own, which waits for all
    # Everything is given, so that JAX detects nothing by itself: under Slurm it would take one GPU of many.
    jax.distributed.initialize(
        place.address, place.count, place.index, place.devices,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=int(max(100, 3 * _seconds(LOST_AFTER))),  # ours is to come first
    )  # fmt: skip
    _explain_aborts(_group)


def is_first() -> bool:
    """Whether this process writes what all share: the run's folder, logs, reports."""
    return (_group.place.index if _group else jax.process_index()) == 0


def barrier(name: str) -> None:
    """Returns when all processes of the run have come here. Raises where one of them has ended."""
    if _group is not None:
        _group.barrier(name)
    elif jax.process_count() > 1:  # begun by the caller
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
                _group.end(_said(error), 2 if isinstance(error, UserError) else 1)
            raise
        barrier("first")
    else:
        barrier("first")
        yield


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
    _exit(code)  # JAX's own end would wait for all processes


def surroundings() -> Place | None:
    """What this process is told of its run: by JAX_… variables, Slurm, Cloud TPU, a Kubernetes Job; None: nothing."""
    count = os.environ.get("JAX_NUM_PROCESSES")
    if count == "1":
        return None
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _explicit(os.environ)
    from jax._src import clusters

    kinds = [clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster]
    if "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes"):
        kinds.append(clusters.K8sCluster)  # it asks Kubernetes, whose other pods are on their own
    for kind in kinds:
        if not kind.is_env_present():
            continue
        try:
            count, index = kind.get_process_count(), kind.get_process_id()
            if kind is clusters.SlurmCluster:
                count = int(os.environ.get("SLURM_STEP_NUM_TASKS", count))
            if count == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = kind.get_coordinator_address(int(_seconds(START_TIMEOUT)), port)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise Interrupted(f"cannot find the other hosts of this run ({_said(error)}); run the same command") from error
        names, devices = host_names(index, count), None
        if kind is clusters.SlurmCluster:
            devices = _slurm_devices(count)
        return Place(index, count, address, names, devices)
    return None


def _explicit(environment: Any) -> Place:
    address = environment["JAX_COORDINATOR_ADDRESS"]
    index = environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX", ""))
    count = environment.get("JAX_NUM_PROCESSES", "")
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS: {address!r} is not HOST:PORT, the address of process 0")
    for name, value in (("JAX_NUM_PROCESSES", count), ("JAX_PROCESS_ID", index)):
        if not value.isdecimal():
            raise UserError(f"{name}: {value!r} is not a number; JAX_COORDINATOR_ADDRESS needs it beside itself")
    if int(index) >= int(count):
        raise UserError(f"JAX_PROCESS_ID: {index} must be less than JAX_NUM_PROCESSES, which is {count}")
    return Place(int(index), int(count), address, host_names(int(index), int(count)))


def host_names(index: int, count: int) -> dict[int, str]:
    """The names of the run's hosts by process, as far as the environment of this one tells them."""
    environment = os.environ
    if nodes := environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST"):
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
        each = [n for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for n in [int(size)] * int(times or 1)]
        names = expand_nodes(nodes)
        each = each if len(each) == len(names) else [count // max(len(names), 1)] * len(names)
        flat = [name for name, tasks_there in zip(names, each, strict=True) for _ in range(tasks_there)]
        return dict(enumerate(flat)) if len(flat) == count else {}
    if workers := environment.get("TPU_WORKER_HOSTNAMES"):
        mine = [name.strip().split(":")[0] for name in workers.split(",")]
        first = int(environment.get("MEGASCALE_SLICE_ID") or 0) * len(mine)  # of other slices it says nothing
        return {first + i: name for i, name in enumerate(mine) if first + i < count and len(mine) > 1}
    pod, number = environment.get("HOSTNAME", ""), environment.get("JOB_COMPLETION_INDEX")
    if number == str(index) and (job := re.fullmatch(rf"(.+)-{index}", pod)):  # an Indexed Job's pods
        return {i: f"{job[1]}-{i}" for i in range(count)}
    return {index: socket.gethostname()}


def expand_nodes(text: str) -> list[str]:
    """["gpu1", "n07", "n08"] from "gpu1,n[07-08]", as Slurm writes it."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        made = [""]
        for plain, inside in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            ends = [plain]
            if inside:
                ends = []
                for span in inside.split(","):
                    low, _, high = span.partition("-")
                    ends += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
            made = [name + end for name in made for end in ends]
        names += made
    return names


def _slurm_devices(count: int) -> list[int] | None:
    """The task's own device where tasks share a host and see all its devices; None: all that it sees."""
    hosts = int(os.environ.get("SLURM_STEP_NUM_NODES", count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return [int(os.environ["SLURM_LOCALID"])] if count > hosts and len(visible) > 1 else None


def _seconds(name: str) -> float:
    text = os.environ.get(name)
    try:
        return float(text) if text else _DEFAULTS[name]
    except ValueError:
        raise UserError(f"{name}: {text!r} is not a number of seconds") from None


# The start. Messages are lines of JSON, from process 0 and to it.


def _meet(place: Place, until: float) -> "_Group":
    """Waits for all processes of the run, and returns this one's connections. Raises Interrupted."""
    connections, names = _receive_all(place, until) if place.index == 0 else _join(place, until)
    group = _Group(Place(place.index, place.count, place.address, names, place.devices), connections)
    threading.Thread(target=group.watch, name="hosts", daemon=True).start()
    return group


def _receive_all(place: Place, until: float) -> tuple[dict[int, "_Connection"], dict[int, str]]:
    """Process 0's side: its connections to all others, and the names of their hosts."""
    names = {**place.names, 0: socket.gethostname()}
    come: dict[int, _Connection] = {}
    started, told = time.monotonic(), 0.0
    with _listen(int(place.address.rsplit(":", 1)[1]), until) as server:
        while len(come) < place.count - 1:
            missing = [i for i in range(1, place.count) if i not in come]
            now = time.monotonic()
            if now > until:
                limit = f"within {now - started:.0f} s"
                text = f"{_list(place, missing)} did not come {limit}, of {place.count} processes; {_ALL}"
                for connection in come.values():
                    connection.send(error=text)
                raise Interrupted(text)
            if now > started + 15 and now > told + 60:
                print(f"waiting for {_list(place, missing)} of {place.count} processes", file=sys.stderr, flush=True)
                told = now
            for index in [i for i, connection in come.items() if connection.closed()]:
                del come[index]  # it has died, and may come again
            with suppress(OSError):  # nobody in the last second
                connection = _Connection(server.accept()[0])
                hello = connection.receive_one(5)
                if hello.get("count") != place.count or not 0 < hello.get("process", 0) < place.count:
                    connection.send(error=f"this process is one of {hello.get('count')}, process 0 of {place.count}")
                    continue
                come[hello["process"]] = connection
                names[hello["process"]] = hello["host"]
    for connection in come.values():
        connection.send(names=[names[i] for i in range(place.count)])
    return come, names


_ALL = "start the same command on all hosts, or set JAX_NUM_PROCESSES=1 for a process on its own"


def _listen(port: int, until: float) -> socket.socket:
    while True:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
            server.settimeout(1)
            return server
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(f"cannot listen on port {port} of this host: {error.strerror}; end what uses it") from None
            time.sleep(1)  # the run before this one may be about to end


def _join(place: Place, until: float) -> tuple[dict[int, "_Connection"], dict[int, str]]:
    """The others' side: the connection to process 0."""
    host, port = place.address.rsplit(":", 1)
    while True:
        try:
            connection = _Connection(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            connection.send(process=place.index, count=place.count, host=socket.gethostname())
            answer = connection.receive_one(max(until - time.monotonic(), 0) + 10)
        except (OSError, ValueError) as error:  # it is not there yet, or what is there is the run before
            if time.monotonic() > until:
                text = f"{place.name(0)} at {place.address} did not answer in time ({_said(error)}); {_ALL}"
                raise Interrupted(text) from None
            time.sleep(0.5)
            continue
        if "error" in answer:
            raise Interrupted(answer["error"])
        return {0: connection}, dict(enumerate(answer["names"]))


def _list(place: Place, indices: list[int]) -> str:
    names = [place.name(i) for i in indices[:8]] + (["…"] if len(indices) > 8 else [])
    return ("host " if len(indices) == 1 else "hosts ") + ", ".join(names)


class _Connection:
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
        try:
            return not self.stream.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


@dataclass(frozen=True)
class _End:
    """That a process has ended before the run: which, why and with what exit code."""

    index: int
    reason: str
    code: int


class _Group:
    """This process among the others, from the start to the end."""

    def __init__(self, place: Place, connections: dict[int, _Connection]):
        self.place = place
        self._connections = connections
        self._changed = threading.Condition()
        self._rounds: Counter[str] = Counter()
        self._at: dict[str, set[int]] = {}  # process 0: who has come to a barrier
        self._through: set[str] = set()
        self._left: set[int] = set()  # those that have ended well
        self._end: _End | None = None
        self._noticed = False

    def barrier(self, name: str) -> None:
        self._rounds[name] += 1
        key = f"{name} {self._rounds[name]}"
        self._arrive(key, self.place.index) if self.place.index == 0 else self._connections[0].send(at=key)
        with self._changed:
            while key not in self._through:
                if self._end or self._left:
                    raise self.error()
                self._changed.wait(1)
            self._through.discard(key)

    def end(self, reason: str, code: int) -> None:
        """Tells the others that this process ends before its time."""
        with self._changed:
            self._noticed = True
            if self._end is None:
                self._end = _End(self.place.index, reason, code)
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
            end = self._end or _End(min(self._left, default=0), "has ended", 75)
        name = self.place.name(end.index)
        if end.code == 2:
            return UserError(f"host {name}: {end.reason}")
        if end.code == 1:
            return Interrupted(f"host {name} has failed: {end.reason}; look into its log")
        return Interrupted(f"host {name} {end.reason}; {GO_ON}")

    def watch(self) -> None:
        """Reads what the others say, in a thread; ends the process if it does not end by itself when it should."""
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                connection.heard = time.monotonic()
                selector.register(connection.stream, selectors.EVENT_READ, index)
            limit = _seconds(LOST_AFTER)
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
                    if now > ended + (_GRACE if not self._noticed else 4 * _GRACE):
                        self.exit()

    def exit(self) -> NoReturn:
        """Ends this process because of another one's end."""
        error = self.error()
        print(f"jax-it: {' '.join(str(error).split())}", file=sys.stderr)
        _exit(2 if isinstance(error, UserError) else 75)

    def _hear(self, index: int, message: dict[str, Any]) -> None:
        if "at" in message:
            self._arrive(message["at"], index)
        if "through" in message:
            with self._changed:
                self._through.add(message["through"])
                self._changed.notify_all()
        if "left" in message:
            with self._changed:
                self._left.add(index)
                self._changed.notify_all()
        if "ended" in message:
            self._lose(message["ended"], message["reason"], message["code"])

    def _arrive(self, key: str, index: int) -> None:
        """Process 0: notes who has come to a barrier, and lets all through."""
        with self._changed:
            come = self._at.setdefault(key, set())
            come.add(index)
            if len(come) < self.place.count:
                return
            del self._at[key]
            self._through.add(key)
            self._changed.notify_all()
            for connection in self._connections.values():
                connection.send(through=key)

    def _lose(self, index: int, reason: str, code: int = 75) -> None:
        with self._changed:
            if self._end is None and index != self.place.index:
                self._end = _End(index, reason, code)
                self._changed.notify_all()
                self._tell()

    def _tell(self) -> None:
        """Passes the end on: process 0 to all, the others to it."""
        assert self._end is not None
        for connection in self._connections.values():
            connection.send(ended=self._end.index, reason=self._end.reason, code=self._end.code)


_on_abort: list[Any] = []  # the handler, which C holds on to


def _explain_aborts(group: _Group) -> None:
    """Has an abort of JAX's runtime, which ends every process when process 0 is gone, say what ours would."""
    previous: list[Callable[[int], None]] = []

    def explain(number: int) -> None:
        if group.wait_for_end(5):
            group.exit()
        libc.signal(number, ctypes.c_void_p(0))  # another fault: as if this were not here

    libc = ctypes.CDLL(None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    _on_abort.append((handler, previous))
    libc.signal(int(signal.SIGABRT), handler)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _said(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
