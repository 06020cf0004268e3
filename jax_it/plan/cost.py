"""How long a compiled step takes at least: its arithmetic, memory traffic and collectives at published peak rates.

Its regions (the program's body, and each loop's as often as it runs) run one after another, so no step is faster than
the sum of their times. How much slower a real one is, only a profile can tell.

A collective's time is the least that its network allows. Within a slice, a group of chips that spans some dimensions
of the torus can use, in each of them, both directions of a ring or one direction of a line. For a group of `n` devices
and `b` bytes of the whole array on each (for a reduce-scatter, of its operand) a chip sends

    all-gather, reduce-scatter   b (n - 1) / n  over the group's links
    all-reduce                   twice that
    all-to-all                   b m / 8 in a ring of m, b m / 4 in a line, for the longest dimension, over one link
    collective-permute           b over one link

A group over `s` slices first works within each slice, then on its own part between them, where each chip has its share
of its host's network. Of what a chip hands to its host for other slices, an all-reduce sends 2 (s - 1) / s.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax_it.plan.program import Collective, Program
from jax_it.plan.topology import Topology, coordinates, slice_of


@dataclass(frozen=True)
class Traffic:
    """What one chip sends for a collective over one network in a step."""

    kind: str
    network: str  # ICI within a slice, DCN between slices
    dtype: str
    devices: int  # in a group
    runs: int
    bytes: int
    seconds: float  # 0 if the network's rate is not known
    asynchronous: bool
    overlapped: bool
    wasteful: bool  # an all-reduce of which each chip uses only a part
    ops: int = 1  # instructions of the program


@dataclass(frozen=True)
class RegionTime:
    """Seconds of a step that a region takes, by resource."""

    name: str
    runs: int
    compute: float
    memory: float
    overlapped: float  # collectives beside other work
    blocking: float  # collectives that the chip waits for

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.overlapped) + self.blocking


def of_program(program: Program, topology: Topology, devices: list[Any]) -> tuple[list[Traffic], list[RegionTime]]:
    """Return the traffic of a step and the time of each region; no times if the chip's rates are not known.

    `devices` are in the order in which the program numbers them.
    """
    traffic, times, chip = [], [], topology.chip
    for region in program.regions:
        sent = [each for collective in region.collectives for each in of_collective(collective, topology, devices)]
        traffic += sent
        if chip.memory_rate:
            compute = region.flops * region.runs / chip.flops
            memory = region.memory_bytes * region.runs / chip.memory_rate
            networks = [[t.seconds for t in sent if t.overlapped and t.network == each] for each in ("ICI", "DCN")]
            blocking = sum(t.seconds for t in sent if not t.overlapped)
            times.append(RegionTime(region.name, region.runs, compute, memory, max(map(sum, networks)), blocking))
    return traffic, times


def of_collective(c: Collective, topology: Topology, devices: list[Any]) -> Iterator[Traffic]:
    """Yield a collective's traffic on each network that it uses."""
    chip, s, size = topology.chip, topology.slices, c.result_bytes
    if not c.groups:
        factor = {"all-reduce": 2 * (s - 1) / s, "all-gather": s - 1, "collective-permute": 1}.get(c.kind, (s - 1) / s)
        parts = [("DCN", s, size * factor, chip.network_rate)]
    elif c.kind == "collective-permute":
        slices = {slice_of(devices[a]) == slice_of(devices[b]) for a, b in c.groups if a != b}
        parts = [("ICI", 2, size, chip.link_rate) if same else ("DCN", 2, size, chip.network_rate) for same in slices]
    else:
        parts = list(_of_group(c, topology, [devices[i] for i in max(c.groups, key=len)]))
    for network, members, sent, rate in parts:
        if sent:
            yield Traffic(
                c.kind, network, c.dtype, members, c.runs, round(sent * c.runs), sent / rate * c.runs if rate else 0.0,
                c.asynchronous, c.overlapped, c.sliced,
            )  # fmt: skip


def _of_group(c: Collective, topology: Topology, members: list[Any]) -> Iterator[tuple[str, int, float, float]]:
    """Yield (network, devices, bytes that a chip sends, bytes per second)."""
    number, slices, chip = len(members), len(set(map(slice_of, members))), topology.chip
    here = [device for device in members if slice_of(device) == slice_of(members[0])]
    local = len(here)
    # Of each dimension in which these differ: how many there are, and over how many links each sends.
    sizes = [len(set(values)) for values in zip(*map(coordinates, here), strict=True)]
    rings = [size == topology.shape[d] and topology.is_ring(d) for d, size in enumerate(sizes)]
    spans = [(size, 2 if ring else 1) for size, ring in zip(sizes, rings, strict=True) if size > 1]
    whole = c.result_bytes * (number if c.kind == "reduce-scatter" else 1)
    if c.kind == "all-to-all":
        hops = max((size / (4 * links) for size, links in spans), default=1.0)
        yield "ICI", number, whole * (local - 1) / number, chip.link_rate * (local - 1) / local / hops
        yield "DCN", number, whole * (number - local) / number, chip.network_rate
    else:
        times = 2 if c.kind == "all-reduce" else 1
        yield "ICI", number, times * whole * (local - 1) / local, chip.link_rate * sum(links for _, links in spans)
        yield "DCN", number, times * whole / local * (slices - 1) / slices, chip.network_rate
