"""The collectives of a compiled program: what they send among which devices, and what runs beside them."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jax_it.plan.hlo import Array, Computation, Op, read_of

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]

_KINDS: dict[str, Kind] = {
    "all-gather": "all-gather", "reduce-scatter": "reduce-scatter", "all-reduce": "all-reduce",
    "all-to-all": "all-to-all", "ragged-all-to-all": "all-to-all", "collective-permute": "collective-permute",
    "collective-broadcast": "all-gather",
}  # fmt: skip
_COLLECTIVE = re.compile(
    r"(all-gather|reduce-scatter|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(-start|-done)?$"
)
_COMPUTING = ("fusion", "convolution", "dot", "custom-call", "while")


@dataclass(frozen=True)
class Collective:
    """A collective operation, its sizes those of one device and one run."""

    kind: Kind
    name: str
    source: str
    dtype: str
    result_bytes: int  # what it gives each device: of a reduce-scatter, the device's own part
    groups: tuple[tuple[int, ...], ...]  # of devices, by place in the mesh; of a permutation, the pairs; (): slices
    runs: int  # in a step
    asynchronous: bool
    overlapped: bool  # the device computes while it runs
    sliced: bool = False  # an all-reduce of which only a part is used: a reduce-scatter would do
    channel: str = ""


def collectives_of(all_: dict[str, Computation], body: Computation, runs: int, devices: int) -> Iterator[Collective]:
    """The collectives of a computation, those inside fusions too, each once however many steps it is done in."""
    seen: dict[str, Collective] = {}
    for i, op in enumerate(body.ops):
        match = _COLLECTIVE.match(op.kind)
        if op.kind == "send":
            yield _between_slices(body, i, runs)
        elif match and match[2] != "-done":
            overlapped = match[2] == "-start" and _computes_until_done(body, i)
            found = _collective(op, match[1], body, runs, devices, match[2] == "-start", overlapped, False)
            yield dataclasses.replace(found, sliced=_is_sliced(op, body, all_))
        elif op.kind == "async-start":
            inner = all_[op.attribute("calls")]
            for each in inner.ops:
                if m := _COLLECTIVE.match(each.kind):
                    yield _collective(each, m[1], inner, runs, devices, True, _computes_until_done(body, i), False)
        elif op.kind == "fusion":
            inner = all_[op.attribute("calls")]
            for each, where in _deep(inner, all_):
                m = _COLLECTIVE.match(each.kind)
                if not m or m[2] == "-done":
                    continue
                channel = re.search(r"channel_id=(\d+)", each.rest)
                key = channel[1] if channel else each.name
                # Steps of a fused collective bear the same channel: its start, what runs beside computations, its end.
                chained = "async_collective" in inner.name or "chain_id" in each.rest
                computes = chained and any(o.kind in ("convolution", "dot", "fusion") for o in inner.ops)
                found = _collective(each, m[1], where, runs, devices, chained, computes, True)
                if key not in seen or computes:
                    seen[key] = found
    yield from seen.values()


def _is_sliced(op: Op, body: Computation, all_: dict[str, Computation]) -> bool:
    """Whether only parts of an all-reduce's results are used, but for small ones."""
    if op.kind != "all-reduce" or op.root:
        return False
    if len(op.arrays) == 1:
        return _uses_a_part(op, body, all_)
    large = [user for user in body.users.get(op.name, []) if 16 * user.bytes > op.bytes]
    return bool(large) and all(_uses_a_part(user, body, all_) for user in large)


def _uses_a_part(op: Op, body: Computation, all_: dict[str, Computation]) -> bool:
    for user in body.users.get(op.name, []):
        if user.kind in ("dynamic-slice", "bitcast"):
            continue
        if user.kind != "fusion":
            return False
        inner = all_[user.attribute("calls")]
        read = [read_of(inner, inner.parameters[i].name) for i, name in enumerate(user.operands) if name == op.name]
        if any(2 * size > op.bytes for size in read):
            return False
    return True


def _between_slices(body: Computation, start: int, runs: int) -> Collective:
    """A collective between slices, which hosts do: the chip hands its part over, and later takes the result."""
    op = body.ops[start]
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)
    meeting = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', op.rest)
    named = _KINDS.get(kind[1].lower().replace("_", "-") if kind else "", "collective-permute")
    received = {o.name for o in body.ops if o.kind == "recv" and meeting and f'"{meeting[1]}"' in o.rest}
    overlapped = False
    for each in body.ops[start + 1 :]:
        if each.kind == "recv-done" and received & set(each.operands):
            break
        overlapped |= each.kind in _COMPUTING
    else:
        overlapped = False
    part = op.arrays[0]
    return Collective(named, op.name, op.source, part.dtype, part.bytes, (), runs, True, overlapped)


def _deep(inner: Computation, all_: dict[str, Computation]) -> Iterator[tuple[Op, Computation]]:
    for op in inner.ops:
        yield op, inner
        if op.kind == "fusion":
            yield from _deep(all_[op.attribute("calls")], all_)


def _computes_until_done(body: Computation, start: int) -> bool:
    """Whether anything but moving runs between an operation's start and its end, in the order of the schedule."""
    waiting = {body.ops[start].name}
    for op in body.ops[start + 1 :]:
        if waiting & set(op.operands):
            if op.kind.endswith("-done"):
                return False
            waiting.add(op.name)
        elif op.kind in _COMPUTING:
            return True
    return False


def _collective(
    op: Op, name: str, body: Computation, runs: int, devices: int, asynchronous: bool, overlapped: bool, fused: bool
) -> Collective:
    kind = _KINDS[name]
    groups = pairs_of(op.rest) if kind == "collective-permute" else groups_of(op.rest, devices)
    arrays = op.arrays
    if op.kind.endswith("-start") and kind in ("all-gather", "collective-permute") and len(arrays) > 1:
        # (operands, results, flags): the results are as many as the operands
        number = max(len(op.operands), 1)
        arrays = arrays[number : 2 * number]
    largest = max(arrays, key=lambda a: a.bytes, default=Array("", (), False))
    result = sum(a.bytes for a in arrays)
    if kind == "all-reduce":
        users = body.users.get(op.name, [])
        if fused and not op.root and users and all(user.kind == "dynamic-slice" for user in users):
            # A fusion of both is a reduce-scatter: each device keeps its part.
            kind, result = "reduce-scatter", sum(user.bytes for user in users)
    channel = re.search(r"channel_id=(\d+)", op.rest)
    return Collective(
        kind, op.name, op.source, largest.dtype, result, groups, runs, asynchronous, overlapped,
        channel=channel[1] if channel else "",
    )  # fmt: skip


def groups_of(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices of a collective, in any of the forms in which XLA writes them."""
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [tuple(int(d) for d in g.split(",") if d) for g in re.findall(r"\{([\d,]*)\}", match[1])]
        return tuple(groups) if any(groups) else (tuple(range(devices)),)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes, order = _ints(match[1]), _iota(match[2], match[3])
        each = len(order) // sizes[0]
        return tuple(tuple(order[i : i + each]) for i in range(0, len(order), each))
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    ):
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])]
        total = math.prod(size for _, size in axes)
        ids = _iota(match[2], match[3]) if match[2] else list(range(total))
        chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4])
        return _mesh_groups(axes, ids, chosen)
    return (tuple(range(devices)),)


def _mesh_groups(
    axes: list[tuple[str, int]], ids: list[int], chosen: list[tuple[str, str, str]]
) -> tuple[tuple[int, ...], ...]:
    """Devices that differ only along the chosen axes, or parts of axes: (name, what is before it, its size)."""
    parts: list[tuple[bool, int]] = []  # (chosen, size), the axes cut into what is chosen and what is not
    for name, size in axes:
        mine = sorted((int(pre or 1), int(n or size)) for axis, pre, n in chosen if axis == name)
        at = 1
        for pre, number in mine:
            if pre > at:
                parts.append((False, pre // at))
            parts.append((True, number))
            at = pre * number
        if at < size:
            parts.append((False, size // at))
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, device in enumerate(ids):
        key = []
        for taken, size in reversed(parts):
            place, digit = divmod(place, size)
            if not taken:
                key.append(digit)
        groups.setdefault(tuple(key), []).append(device)
    return tuple(map(tuple, groups.values()))


def pairs_of(text: str) -> tuple[tuple[int, ...], ...]:
    """The (source, target) pairs of a permutation."""
    match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])) if match else ()


def _ints(text: str) -> list[int]:
    return [int(d) for d in text.split(",")]


def _iota(dims: str, order: str | None) -> list[int]:
    """0, 1, 2, … laid out in `dims`, its axes in this order, and read off again."""
    sizes = _ints(dims)
    axes = _ints(order) if order else list(range(len(sizes)))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    found = [0]
    for axis in axes:
        found = [base + i * strides[axis] for base in found for i in range(sizes[axis])]
    return found
