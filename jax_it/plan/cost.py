"""What a compiled step costs a chip: the time of its arithmetic, of its memory and of each network, and their bound.

The bound on a step's time is the sum over its regions (the program's body, and each loop's as often as it runs) of

    max(arithmetic, memory traffic, traffic of collectives that run beside other work) + the other collectives

each over the published peak rate. Regions follow one another and collectives do not reach over their borders, so no
step is faster; how much slower a real one is, is for a profile to say.

A collective's time is the least that its network allows. Within a slice a group of chips that spans some dimensions of
the torus can use, in each of them, both directions of a ring or the one way through a line. Between slices each chip
has its share of its host's network. `n` devices, `b` bytes of the whole array on each (of a reduce-scatter, of its
operand):

    all-gather, reduce-scatter   b (n - 1) / n  over the group's links
    all-reduce                   twice that
    all-to-all                   b m / 8 of a ring of m, b m / 4 of a line, of the longest dimension, over one link
    collective-permute           b over one link

A group over `s` slices first works within each slice, on its own part of what goes between them; of what chips hand
to their hosts (`send`) an all-reduce sends 2 (s - 1) / s.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jax_it.plan.collectives import Collective
from jax_it.plan.program import Program, Region
from jax_it.plan.topology import Topology, place_of, slice_of

Network = Literal["ICI", "DCN"]


@dataclass(frozen=True)
class Traffic:
    """One collective on one network; the sizes are of one chip and all its runs in a step."""

    kind: str
    network: Network
    dtype: str
    devices: int  # in a group
    slices: int
    runs: int
    bytes: int  # sent
    seconds: float
    asynchronous: bool
    overlapped: bool
    wasteful: bool  # an all-reduce of which each chip keeps a part
    source: str
    name: str


@dataclass(frozen=True)
class Share:
    """Seconds of one region in a step, and how much of it nothing can hide."""

    name: str
    runs: int
    compute: float
    memory: float
    overlapped: float
    blocking: float
    heaviest: str = ""  # JAX's name of the operation that moves most memory

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.overlapped) + self.blocking


def traffic(program: Program, topology: Topology, devices: list[Any]) -> list[Traffic]:
    """Every collective of a step; `devices` are in the order in which the program numbers them."""
    found: list[Traffic] = []
    for region in program.regions:
        found += _of_region(region, topology, devices)
    return found


def shares(program: Program, topology: Topology, devices: list[Any]) -> list[Share]:
    """The time of each region, by the chip's published rates; none where they are not known."""
    chip = topology.chip
    if chip is None or not chip.memory_rate:
        return []
    found = []
    for region in program.regions:
        moved = list(_of_region(region, topology, devices))
        beside = [sum(t.seconds for t in moved if t.overlapped and t.network == network) for network in ("ICI", "DCN")]
        found.append(
            Share(
                region.name,
                region.runs,
                region.flops * region.runs / chip.flops,
                region.memory_bytes * region.runs / chip.memory_rate,
                max(beside),
                sum(t.seconds for t in moved if not t.overlapped),
                region.heaviest,
            )
        )
    return found


def _of_region(region: Region, topology: Topology, devices: list[Any]) -> Iterator[Traffic]:
    for collective in region.collectives:
        yield from _of_collective(collective, topology, devices)


def _of_collective(c: Collective, topology: Topology, devices: list[Any]) -> Iterator[Traffic]:
    if not c.groups:
        parts: Iterable[Part] = [_between_slices(c, topology)]
    elif c.kind == "collective-permute":
        parts = _of_permutation(c, topology, devices)
    else:
        parts = _of_groups(c, topology, devices)
    for network, members, slices, sent, seconds in parts:
        if sent:
            yield Traffic(
                c.kind, network, c.dtype, members, slices, c.runs, round(sent * c.runs), seconds * c.runs,
                c.asynchronous, c.overlapped, c.sliced, c.source, c.name,
            )  # fmt: skip


Part = tuple[Network, int, int, float, float]  # network, devices, slices, bytes sent by a chip, seconds


def _of_permutation(c: Collective, topology: Topology, devices: list[Any]) -> Iterator[Part]:
    pairs = [(devices[a], devices[b]) for a, b in c.groups if a != b]
    far = [pair for pair in pairs if slice_of(pair[0]) != slice_of(pair[1])]
    chip = topology.chip
    if far:
        seconds = c.result_bytes / chip.network_rate if chip and chip.network_rate else 0.0
        yield "DCN", 2, topology.slices, c.result_bytes, seconds
    if len(pairs) > len(far):
        yield "ICI", 2, 1, c.result_bytes, c.result_bytes / chip.link_rate if chip and chip.link_rate else 0.0


def _between_slices(c: Collective, topology: Topology) -> Part:
    """Of what each chip hands over to its host."""
    slices, chip = topology.slices, topology.chip
    times = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1, "collective-permute": 1}
    sent = c.result_bytes * times.get(c.kind, (slices - 1) / slices)
    return "DCN", slices, slices, sent, sent / chip.network_rate if chip and chip.network_rate else 0.0


def _of_groups(c: Collective, topology: Topology, devices: list[Any]) -> Iterator[Part]:
    members = [devices[i] for i in max(c.groups, key=len)]
    number = len(members)
    if number < 2:
        return
    whole = c.result_bytes * (number if c.kind == "reduce-scatter" else 1)
    slices = len({slice_of(device) for device in members})
    here = [device for device in members if slice_of(device) == slice_of(members[0])]
    near, chip = len(here), topology.chip
    times = 2 if c.kind == "all-reduce" else 1
    if near > 1:
        if c.kind == "all-to-all":
            sent = whole * (near - 1) / number
            yield "ICI", number, slices, sent, _exchange_seconds(whole * near / number, here, topology)
        else:
            sent = times * whole * (near - 1) / near
            rate = _rate(here, topology)
            yield "ICI", number, slices, sent, sent / rate if rate else 0.0
    if slices > 1:
        if c.kind == "all-to-all":
            sent = whole * (number - near) / number
        else:
            sent = times * (whole / near) * (slices - 1) / slices
        yield "DCN", number, slices, sent, sent / chip.network_rate if chip and chip.network_rate else 0.0


def _spans(members: Iterable[Any], topology: Topology) -> Iterator[tuple[int, bool]]:
    """Of each dimension in which members lie apart: at how many places, and whether those make a ring."""
    for dimension, values in enumerate(zip(*(place_of(device) for device in members), strict=True)):
        places = len(set(values))
        if places > 1:
            yield places, places == topology.shape[dimension] and topology.is_ring(dimension)


def _rate(members: list[Any], topology: Topology) -> float:
    """Bytes a second that each of a group of chips can send to the others."""
    links = sum(2 if ring else 1 for _, ring in _spans(members, topology))
    return links * topology.chip.link_rate if topology.chip else 0.0


def _exchange_seconds(whole: float, members: list[Any], topology: Topology) -> float:
    if topology.chip is None or not topology.chip.link_rate:
        return 0.0
    longest = max((places / (8 if ring else 4) for places, ring in _spans(members, topology)), default=0.0)
    return whole * longest / topology.chip.link_rate
