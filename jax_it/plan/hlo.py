"""A compiled program's text, read for what it computes, moves and sends.

XLA's own cost analysis counts the body of a loop once. Here each computation has the number of times that it
runs, worked out from the loops' bounds.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_KINDS: dict[str, Kind] = {
    "all-gather": "all-gather", "reduce-scatter": "reduce-scatter", "all-reduce": "all-reduce",
    "all-to-all": "all-to-all", "ragged-all-to-all": "all-to-all", "collective-permute": "collective-permute",
    "collective-broadcast": "all-gather",
}  # fmt: skip
_COLLECTIVE = re.compile(
    r"(all-gather|reduce-scatter|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(-start|-done)?$"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_COMPUTING = ("fusion", "convolution", "dot", "custom-call", "while")
_FREE = {  # they move nothing
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "copy-done", "slice-done", "async-done", "async-update", "opt-barrier",
    "add-dependency", "domain", "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv",
    "recv-done",
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """An array type in the program: one shard, since the program is that of one device."""

    dtype: str
    dims: tuple[int, ...]
    near: bool  # in a memory on the chip's own die, not in its main memory

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.elements * BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0) // 8)


def arrays_of(shape: str) -> list[Array]:
    """The arrays of a type's text, one for "f32[2,3]{1,0}", several for a tuple."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, bool(re.search(r"S\([1-9]", layout))))
    return found


@dataclass
class Op:
    """One instruction."""

    name: str
    shape: str
    kind: str  # XLA's opcode
    operands: tuple[str, ...]
    inside: str  # the text between its parentheses
    rest: str  # the text after them
    root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays_of(self.shape)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str:
        """The computation that an attribute such as `calls` names; "" without it."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""

    @property
    def source(self) -> str:
        """JAX's name of the operation that this comes from."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1] if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs as part of itself, once."""
        one = [self.attribute(name) for name in ("calls", "to_apply") if self.attribute(name)]
        if self.kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
            one += _NAME.findall(branches[1]) if branches else []
            one += [self.attribute(name) for name in ("true_computation", "false_computation") if self.attribute(name)]
        return tuple(one)


@dataclass
class Computation:
    name: str
    entry: bool
    ops: list[Op] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    @property
    def root(self) -> Op:
        return next((op for op in self.ops if op.root), self.ops[-1])

    @cached_property
    def parameters(self) -> dict[int, Op]:
        return {int(op.inside.strip()): op for op in self.ops if op.kind == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Op]]:
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            for operand in op.operands:
                found.setdefault(operand, []).append(op)
        return found


def parse(text: str) -> dict[str, Computation]:
    """The computations of a compiled program's text, by name."""
    found: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and not line.startswith("HloModule"):
                match = re.match(r"(ENTRY )?%?([\w.\-]+) ", line)
                if match and "->" in line:
                    current = Computation(match[2], bool(match[1]))
        elif re.match(r"\}(, execution_thread=.*)?$", line):
            found[current.name] = current
            current = None
        elif op := _parse_op(line):
            current.ops.append(op)
        elif current.ops:  # an attribute of several lines
            current.ops[-1].rest += line
    return found


def _parse_op(line: str) -> Op | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    start = match.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    shape = line[start:end]
    opcode = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    operands = tuple(_NAME.findall(inside)) if opcode[1] != "constant" else ()
    return Op(match[2], shape, opcode[1], operands, inside, line[close + 1 :], bool(match[1]))


def _closing(line: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for i in range(start, len(line)):
        if line[i] == "(":
            depth += 1
        elif line[i] == ")":
            depth -= 1
            if not depth:
                return i
    return len(line) - 1


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
        region.collectives += _collectives(self.computations, body, region.runs, self.devices)
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
            total += min(_read_of(inner, parameter.name), sum(a.bytes for a in arrays if not a.near))
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


def _read_of(inner: Computation, name: str) -> int:
    """Bytes that a fusion reads of its parameter: those of its slices, if it only slices it."""
    total = 0
    for user in inner.users.get(name, []):
        if user.kind in ("bitcast", "reshape"):
            total += _read_of(inner, user.name)
        elif user.kind in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
            total += user.bytes
        elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
            pass
        else:
            return inner.by_name[name].bytes
    return total


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


def _collectives(all_: dict[str, Computation], body: Computation, runs: int, devices: int) -> Iterator[Collective]:
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
        read = [_read_of(inner, inner.parameters[i].name) for i, name in enumerate(user.operands) if name == op.name]
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
