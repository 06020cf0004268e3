"""What a compiled program computes, moves and sends.

XLA's own cost analysis counts the body of a loop once. Here each computation has the number of times that it
runs, worked out from the loops' bounds.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from jax_it.plan.collectives import Collective, collectives_of
from jax_it.plan.hlo import Computation, Op, parse, read_of

_FREE = {  # they move nothing
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "copy-done", "slice-done", "async-done", "async-update", "opt-barrier",
    "add-dependency", "domain", "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv",
    "recv-done",
}  # fmt: skip


@dataclass
class Region:
    """The entry computation or a loop's body, with all that it calls but other loops; sizes are of one run."""

    name: str
    runs: int
    flops: float = 0.0
    memory_bytes: int = 0  # moved to and from main memory
    heaviest: str = ""  # JAX's name of the operation that moves most
    heaviest_bytes: int = 0
    collectives: list[Collective] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    devices: int

    @classmethod
    def of(cls, text: str, devices: int) -> "Program":
        return cls(parse(text), devices)

    @cached_property
    def entry(self) -> Computation:
        return next(c for c in self.computations.values() if c.entry)

    @cached_property
    def regions(self) -> list[Region]:
        """The entry and the loops; a loop whose number of turns is not in the text counts once."""
        return list(self._regions(self.entry, 1, frozenset()))

    @cached_property
    def endless(self) -> list[str]:
        """JAX's names of the loops whose number of turns is not in the text."""
        loops = [(op, body) for body in self.computations.values() for op in body.ops if op.kind == "while"]
        return [op.source or op.name for op, body in loops if self.turns(op, body) is None]

    def _regions(self, body: Computation, runs: int, begun: frozenset[str]) -> Iterator[Region]:
        """`begun` are the channels of collectives that began outside of this loop and go on beside its work."""
        region = Region(body.name, runs)
        inner: list[tuple[Computation, int]] = []
        self._visit(body, region, inner)
        region.collectives = [c for c in region.collectives if not c.channel or c.channel not in begun]
        yield region
        begun |= {c.channel for c in region.collectives if c.asynchronous}
        for loop, turns in inner:
            yield from self._regions(loop, runs * turns, begun)

    def _visit(self, body: Computation, region: Region, loops: list[tuple[Computation, int]]) -> None:
        """Adds a computation's instructions to the region; those of `call` and `conditional` with theirs."""
        region.collectives += collectives_of(self.computations, body, region.runs, self.devices)
        for op in body.ops:
            if op.kind == "while":
                loops.append((self.computations[op.attribute("body")], self.turns(op, body) or 1))
            elif op.kind in ("call", "conditional"):
                for name in op.called:
                    self._visit(self.computations[name], region, loops)
            else:
                region.flops += self._flops(op, body)
                moved = self._memory(op, body)
                region.memory_bytes += moved
                if moved > region.heaviest_bytes and op.source:
                    region.heaviest, region.heaviest_bytes = op.source, moved

    @cached_property
    def kept(self) -> tuple[int, int]:
        """Bytes that loops over layers pile up, a part each turn: (in the forward passes, in the backward ones).

        The first are activations that wait for the backward pass, the second gradients of the layers' weights.
        """
        forward = backward = 0
        for body in self.computations.values():
            for op in body.ops:
                if op.kind == "while":
                    piled = self._piled(op, self.turns(op, body) or 0)
                    if "transpose(" in op.source:
                        backward += piled
                    elif "jvp(" in op.source:
                        forward += piled
        return forward, backward

    def _piled(self, op: Op, turns: int) -> int:
        loop = self.computations[op.attribute("body")]
        if loop.root.kind != "tuple":
            return 0
        total = 0
        for i, (array, name) in enumerate(zip(op.arrays, loop.root.operands, strict=False)):
            made = loop.by_name[name]
            same = made.kind == "get-tuple-element" and _index(made) == i
            if not same and not array.near and len(array.dims) > 1 and array.dims[0] == turns:
                total += array.bytes
        return total

    def turns(self, op: Op, body: Computation) -> int | None:
        """How often a loop's body runs; None where the text does not tell."""
        try:
            return self._turns(op, body)
        except (ValueError, KeyError, IndexError):
            return None

    def _turns(self, op: Op, body: Computation) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest)
        if known:
            return int(known[1])
        condition, loop = self.computations[op.attribute("condition")], self.computations[op.attribute("body")]
        compare, bindings = _unwrap(condition.root, self.computations)
        if compare.kind != "compare":
            raise ValueError(f"loop {op.name} ends by {compare.kind}, not by a count")
        direction = re.search(r"direction=(\w+)", compare.rest)
        sides = [_follow(name, bindings, condition) for name in compare.operands]
        if isinstance(sides[0], int):
            sides.reverse()
        counter, limit = sides
        initial = body.by_name[op.operands[0]]
        if isinstance(counter, int):
            raise ValueError(f"loop {op.name} compares two constants")
        at = _index(condition.by_name[counter])
        start = _constant(initial.operands[at], body)
        step = _step(loop, at, self.computations)
        if isinstance(limit, int):
            end: int | None = limit
        else:
            end = _constant(initial.operands[_index(condition.by_name[limit])], body)
        if start is None or end is None or step is None or direction is None:
            raise ValueError(f"loop {op.name} has no bound that the text tells")
        more = {"LT": 0, "LE": 1, "GT": 0, "GE": -1, "NE": 0}[direction[1]]
        return max(-(-(end + more - start) // step), 0)

    def _flops(self, op: Op, body: Computation) -> float:
        """Of matrix products and convolutions; all else is small beside them, or bound by memory."""
        if op.kind == "dot":
            left = body.by_name[op.operands[0]].arrays[0]
            over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
            dims = [left.dims[int(d)] for d in over[1].split(",") if d] if over else []
            return 2.0 * op.arrays[0].elements * math.prod(dims)
        if op.kind == "convolution":
            return _convolution_flops(op, body)
        if op.kind == "custom-call" and (products := _attention_products(op)):
            return products * _attention_flops(op, body)
        if op.kind in ("fusion", "async-start", "custom-call"):
            total = 0.0
            for name in op.called:
                inner = self.computations.get(name)
                if inner:
                    total += sum(self._flops(each, inner) for each in inner.ops)
            return total
        return 0.0

    def _memory(self, op: Op, body: Computation) -> int:
        """Bytes to and from main memory; of what is only sliced or updated in place, no more than that part."""
        if op.kind in _FREE:
            return 0
        inner = self.computations.get(op.attribute("calls")) if op.kind in ("fusion", "async-start") else None
        if inner is None:
            if op.kind in ("dynamic-slice", "gather", "slice"):
                return 2 * sum(a.bytes for a in op.arrays if not a.near)
            if op.kind in ("dynamic-update-slice", "scatter"):
                update = body.by_name.get(op.operands[1 if op.kind == "dynamic-update-slice" else -1])
                return 2 * update.bytes if update else 0
            read = sum(_far_bytes(body, name) for name in set(op.operands))
            if op.kind == "copy-start" or op.kind == "slice-start":
                return min(read, op.arrays[0].bytes) + (0 if op.arrays[0].near else op.arrays[0].bytes)
            results = op.arrays[1:2] if op.kind.endswith("-start") and len(op.arrays) > 1 else op.arrays
            return read + sum(a.bytes for a in results if not a.near)
        total = 0
        for i, name in enumerate(op.operands):
            parameter = inner.parameters.get(i)
            arrays = body.by_name[name].arrays if name in body.by_name else []
            if parameter is None or not any(not a.near for a in arrays):
                continue
            total += min(read_of(inner, parameter.name), sum(a.bytes for a in arrays if not a.near))
        made_by = [inner.by_name.get(n) for n in inner.root.operands] if inner.root.kind == "tuple" else [inner.root]
        for array, maker in zip(op.arrays, made_by, strict=False):
            if array.near:
                continue
            made = _behind_bitcasts(inner, maker)
            if made is not None and made.kind == "dynamic-update-slice":
                update = inner.by_name.get(made.operands[1])
                total += update.bytes if update else 0
            elif made is None or made.kind != "parameter":
                total += array.bytes
        return total


def _attention_products(op: Op) -> int:
    """How many matrix products JAX's splash-attention kernel makes for each pair of a query and a key."""
    found = re.search(r"splash_mha_(fwd|dq|dkv)", op.rest) if "tpu_custom_call" in op.rest else None
    return {"fwd": 2, "dq": 3, "dkv": 4}[found[1]] if found else 0


def _attention_flops(op: Op, body: Computation) -> float:
    """FLOPs of one product of a causal kernel: of each query, the keys before it, half of all on average."""
    arrays = [a for name in op.operands if name in body.by_name for a in body.by_name[name].arrays]
    query = max((a for a in arrays if a.dtype in ("bf16", "f32") and len(a.dims) >= 3), key=lambda a: a.elements)
    return float(query.elements * query.dims[-2])  # 2 * N T T H / 2


def _far_bytes(body: Computation, name: str) -> int:
    op = body.by_name.get(name)
    return sum(array.bytes for array in op.arrays if not array.near) if op else 0


def _behind_bitcasts(inner: Computation, op: Op | None) -> Op | None:
    while op is not None and op.kind in ("bitcast", "reshape", "copy"):
        op = inner.by_name.get(op.operands[0])
    return op


def _convolution_flops(op: Op, body: Computation) -> float:
    """2 * multiplications, those with padding or with the holes of a dilation left out, as XLA counts."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if not labels:
        return 0.0
    left, right, out = labels.groups()
    x, kernel = (body.by_name[name].arrays[0] for name in op.operands[:2])
    window = dict(re.findall(r"(\w+)=([\w\-x]+)", _braces(op.rest, "window=")))
    spatial = sorted(c for c in out if c.isdigit())

    def per_dim(key: str, default: int) -> list[int]:
        return [int(v) for v in window[key].split("x")] if key in window else [default] * len(spatial)

    sizes, strides = per_dim("size", 1), per_dim("stride", 1)
    left_holes, right_holes = per_dim("lhs_dilate", 1), per_dim("rhs_dilate", 1)
    pads = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else [0] * len(spatial)
    valid = 1
    for i, c in enumerate(spatial):
        length = (x.dims[left.index(c)] - 1) * left_holes[i] + 1
        count = 0
        for k in range(sizes[i]):
            for o in range(op.arrays[0].dims[out.index(c)]):
                at = o * strides[i] + k * right_holes[i] - pads[i]
                count += 0 <= at < length and at % left_holes[i] == 0
        valid *= count
    batch, features = op.arrays[0].dims[out.index("b")], op.arrays[0].dims[out.index("f")]
    return 2.0 * valid * batch * features * kernel.dims[right.index("i")]


def _braces(text: str, before: str) -> str:
    start = text.find(before + "{")
    return text[start + len(before) + 1 : text.index("}", start)] if start >= 0 else ""


def _unwrap(op: Op, all_: dict[str, Computation]) -> tuple[Op, dict[str, str]]:
    """The operation at the bottom of a fusion, and which operand of the fusion each of its parameters is."""
    bindings: dict[str, str] = {}
    while op.kind == "fusion":
        inner = all_[op.attribute("calls")]
        outer = {p.name: op.operands[i] for i, p in inner.parameters.items()}
        bindings = {name: bindings.get(operand, operand) for name, operand in outer.items()} | {
            o.name: o.inside for o in inner.ops if o.kind == "constant"
        }
        op = inner.root
    return op, bindings


def _follow(name: str, bindings: dict[str, str], body: Computation) -> int | str:
    """A constant's value, or the name of the instruction of `body` that a value comes from."""
    while name in bindings:
        name = bindings[name]
    if re.fullmatch(r"-?\d+", name):
        return int(name)
    op = body.by_name[name]
    while op.kind in ("copy", "bitcast", "convert"):
        op = body.by_name[op.operands[0]]
    return int(op.inside) if op.kind == "constant" else op.name


def _index(op: Op) -> int:
    match = re.search(r"index=(\d+)", op.rest)
    if op.kind != "get-tuple-element" or not match:
        raise ValueError(f"{op.name} is no element of the loop's state")
    return int(match[1])


def _constant(name: str, body: Computation) -> int | None:
    op = body.by_name.get(name)
    while op is not None and op.kind in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        op = body.by_name.get(op.operands[0])
    return int(op.inside) if op is not None and op.kind == "constant" and re.fullmatch(r"-?\d+", op.inside) else None


def _step(loop: Computation, at: int, all_: dict[str, Computation]) -> int | None:
    """By how much a loop's body counts element `at` of its state on."""
    op = loop.by_name.get(loop.root.operands[at]) if loop.root.kind == "tuple" else None
    while op is not None and op.kind in ("copy", "bitcast", "copy-done", "copy-start"):
        op = loop.by_name.get(op.operands[0])
    if op is None:
        return None
    op, bindings = _unwrap(op, all_)
    if op.kind != "add":
        return None
    for name in op.operands:
        value: int | str = bindings.get(name, name)
        found = int(value) if re.fullmatch(r"-?\d+", str(value)) else _constant(str(value), loop)
        if found is not None:
            return found
    return None
