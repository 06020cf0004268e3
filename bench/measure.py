"""What the measurements share: sides in processes of their own, ratios by pairs, what the machine can do at most."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

SIZE = 2048  # of the square matrices whose product gives the rate of matmuls
PACKAGES = "jax flax torch transformers ctranslate2 trl datasets".split()


class Remote:
    """A side in a process of its own, which waits while the other works."""

    def __init__(self, make: Callable[[], Any]):
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def _serve(connection: Connection, make: Callable[[], Any]) -> None:
    """Answer calls of a side's functions until there are no more."""
    side = make()
    while (call := connection.recv()) is not None:
        name, arguments = call
        connection.send(getattr(side, name)(*arguments))


class Seconds(NamedTuple):
    """How long something took, and how long all cores worked on it, in its process and in those that it waited for."""

    wall: float
    processor: float

    def times(self, factor: float) -> "Seconds":
        return Seconds(self.wall * factor, self.processor * factor)


def timed(function: Callable[[], Any]) -> Seconds:
    """Call a function, which waits for its results, in this process."""
    began, worked = time.perf_counter(), sum(os.times()[:4])
    function()
    return Seconds(time.perf_counter() - began, sum(os.times()[:4]) - worked)


def alternate(rounds: int, sides: Mapping[Any, Callable[[], Seconds]]) -> dict[Any, list[Seconds]]:
    """Call all sides in turn, so often, and return what each of them took."""
    found: dict[Any, list[Seconds]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
    return found


def ratio(ours: Sequence[Seconds], theirs: Sequence[Seconds]) -> str:
    """Say how many times as long as ours the other side takes: the median of pairs, and their spread.

    Processor time tells more on a machine that does other work too, and says nothing of how well all cores are used.
    """

    def of(kind: str) -> str:
        pairs = [getattr(b, kind) / getattr(a, kind) for a, b in zip(ours, theirs, strict=True)]
        return f"{median(pairs):.2f} ({min(pairs):.2f}–{max(pairs):.2f})"

    return f"{of('wall')}, in processor time {of('processor')}"


def shortest(function: Callable[[], Any], times: int = 5) -> float:
    """Return the shortest of some times, in seconds, after a first call that does not count."""
    function()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def flops_per_second(multiply: Callable[[], Any]) -> float:
    """Return the rate of a product of two float32 matrices of SIZE x SIZE."""
    return 2 * SIZE**3 / shortest(multiply)


def limits() -> dict[str, float]:
    """Return what the device does at most, in float32: FLOPs a second of a matmul, bytes a second of a matrix read.

    The matrix is read by a product with a vector, as decoding one text reads the weights.
    """
    import jax
    import jax.numpy as jnp

    square, tall = jnp.ones((SIZE, SIZE)), jnp.ones((1 << 15, SIZE))  # 256 MiB
    product = jax.jit(lambda a, b: a @ b)
    read = shortest(lambda: product(tall, square[0]).block_until_ready())
    rate = flops_per_second(lambda: product(square, square).block_until_ready())
    return {"flops_per_second": rate, "bytes_per_second": tall.nbytes / read}


def machine() -> str:
    """Say what the machine is, and which versions of libraries were measured."""
    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        model = next((value.strip() for key, value in lines.items() if key.strip() == "model name"), model)
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = f", load {os.getloadavg()[0]:.1f}"
    return f"{model}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, {', '.join(versions)}"
