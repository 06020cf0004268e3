"""How the processes of a run find each other: all connect to process 0, which knows by that who is missing.

Messages are lines of JSON. The address is the one at which JAX's coordinator listens afterwards.
"""

import socket
import sys
import threading
import time
from contextlib import suppress

from jax_it.errors import Interrupted, UserError, first_line
from jax_it.hosts.group import Connection, Group
from jax_it.hosts.surroundings import ALONE, Place


def meet(place: Place, until: float) -> "Group":
    """Waits for all processes of the run, and returns this one's connections. Raises Interrupted."""
    connections, names = _receive_all(place, until) if place.index == 0 else _join(place, until)
    group = Group(Place(place.index, place.count, place.address, names, place.devices), connections)
    threading.Thread(target=group.watch, name="hosts", daemon=True).start()
    return group


def _receive_all(place: Place, until: float) -> tuple[dict[int, "Connection"], dict[int, str]]:
    """Process 0's side: its connections to all others, and the names of their hosts."""
    names = {**place.names, 0: socket.gethostname()}
    come: dict[int, Connection] = {}
    started, told = time.monotonic(), 0.0
    with _listen(int(place.address.rsplit(":", 1)[1]), until) as server:
        while len(come) < place.count - 1:
            missing = [i for i in range(1, place.count) if i not in come]
            now = time.monotonic()
            if now > until:
                limit = f"within {now - started:.0f} s"
                text = f"{_list(place, missing)} did not come {limit}, of {place.count} processes; {ALONE}"
                for connection in come.values():
                    connection.send(error=text)
                raise Interrupted(text)
            if now > started + 15 and now > told + 60:
                print(f"waiting for {_list(place, missing)} of {place.count} processes", file=sys.stderr, flush=True)
                told = now
            for index in [i for i, connection in come.items() if connection.closed()]:
                del come[index]  # it has died, and may come again
            with suppress(
                OSError, ValueError, TypeError, KeyError
            ):  # nobody in the last second, or no process of a run
                connection = Connection(server.accept()[0])
                hello = connection.receive_one(5)
                if hello.get("count") != place.count or not 0 < hello.get("process", 0) < place.count:
                    connection.send(error=f"this process is one of {hello.get('count')}, process 0 of {place.count}")
                    continue
                come[hello["process"]] = connection
                names[hello["process"]] = hello["host"]
    for connection in come.values():
        connection.send(names=[names[i] for i in range(place.count)])
    return come, names


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
                raise UserError(f"cannot listen on port {port}: {error.strerror}; end what uses it") from None
            time.sleep(1)  # the run before this one may be about to end


def _join(place: Place, until: float) -> tuple[dict[int, "Connection"], dict[int, str]]:
    """The others' side: the connection to process 0."""
    host, port = place.address.rsplit(":", 1)
    while True:
        try:
            connection = Connection(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            connection.send(process=place.index, count=place.count, host=socket.gethostname())
            answer = connection.receive_one(max(until - time.monotonic(), 0) + 10)
        except (OSError, ValueError) as error:  # it is not there yet, or what is there is the run before
            if time.monotonic() > until:
                text = f"{place.name(0)} at {place.address} did not answer in time ({first_line(error)}); {ALONE}"
                raise Interrupted(text) from None
            time.sleep(0.5)
            continue
        if "error" in answer:
            raise Interrupted(answer["error"])
        return {0: connection}, dict(enumerate(answer["names"]))


def _list(place: Place, indices: list[int]) -> str:
    names = [place.name(i) for i in indices[:8]] + (["…"] if len(indices) > 8 else [])
    return ", ".join(names)
