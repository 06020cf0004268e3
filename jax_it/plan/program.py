"""What a compiled program computes, moves and sends, read from its HLO text. Nothing else reads that text.

`compiled.cost_analysis()` counts the body of a loop once, and knows neither collectives nor what runs beside them.
Here each computation counts as often as it runs. XLA's operation semantics: https://openxla.org/xla/operation_semantics
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

Groups = tuple[tuple[int, ...], ...]
_COLLECTIVES = {
    **{kind: kind for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")},
    "ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather",
}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """A collective operation of one device."""

    kind: str  # one of the values of _COLLECTIVES
    dtype: str
    result_bytes: int  # on each device; for a reduce-scatter, its own part
    groups: Groups  # of devices, by position in the mesh; pairs for a permutation; () between slices, through hosts
    runs: int  # in a step
    asynchronous: bool
    overlapped: bool  # the device computes meanwhile
    sliced: bool = False  # an all-reduce of which only a part is used: a reduce-scatter would do
    channel: str = ""


@dataclass
class Region:
    """The entry computation or a loop's body, with all that it calls except other loops. Sizes are per run."""

    name: str
    runs: int
    flops: float = 0.0
    memory_bytes: int = 0  # moved to and from main memory
    collectives: list[Collective] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """One device's part of a compiled step."""

    regions: list[Region] = field(default_factory=list)
    unknown_trip_counts: list[str] = field(default_factory=list)  # JAX's names of loops, which count once
    activation_bytes: int = 0  # that loops over layers keep for the backward pass
    gradient_bytes: int = 0  # that loops over layers produce in the backward pass


def read(text: str, devices: int) -> Program:
    """Read the text of a program that was compiled for this number of devices."""
    computations = parse(text).values()
    loops = [op for computation in computations for op in computation.ops if op.kind == "while"]
    return Program(
        list(_regions(next(c for c in computations if c.entry), 1, devices, frozenset())),
        [loop.source or loop.name for loop in loops if trip_count(loop) is None],
        sum(_stacked_bytes(loop) for loop in loops if "jvp(" in loop.source and "transpose(" not in loop.source),
        sum(_stacked_bytes(loop) for loop in loops if "transpose(" in loop.source),
    )


@dataclass(frozen=True)
class Array:
    """The part of an array that is on one device."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a memory on the chip's die (VMEM), not in its main memory (HBM)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # of "bf16", "f8e4m3fn", "s4"
        return -(-math.prod(self.dims) * (8 if self.dtype == "pred" else int(bits[0]) if bits else 0) // 8)


def arrays_of(shape: str) -> list[Array]:
    """Read a type such as "f32[2,3]{1,0}" or a tuple of these."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?", re.sub(r"/\*.*?\*/", "", shape))
    return [Array(dtype, tuple(_ints(dims)), bool(re.search(r"S\([1-9]", layout))) for dtype, dims, layout in found]


def hbm_bytes(arrays: list[Array]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@dataclass(eq=False)
class Op:
    """An instruction, linked to those that it uses and to those that use it."""

    name: str
    shape: str
    kind: str  # XLA's opcode
    inside: str  # the text between its parentheses
    attributes: str  # the text after them
    root: bool
    operands: list["Op"] = field(default_factory=list)
    users: list["Op"] = field(default_factory=list)
    called: list["Computation"] = field(default_factory=list)  # for a while loop: condition, body

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays_of(self.shape)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def find(self, pattern: str) -> str:
        """Return what the group of a pattern matches in the attributes, or ""."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    @property
    def source(self) -> str:
        """JAX's name of the operation that this comes from."""
        return self.find(r'op_name="((?:[^"\\]|\\.)*)"')

    @property
    def is_collective(self) -> bool:
        """Tell whether this performs or starts a collective."""
        return self.kind.removesuffix("-start") in _COLLECTIVES


@dataclass(eq=False)
class Computation:
    name: str
    entry: bool
    ops: list[Op] = field(default_factory=list)

    @property
    def root(self) -> Op:
        return next((op for op in self.ops if op.root), self.ops[-1])


_OP = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)((?:, .*)?)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|[\w%.\-]+)"
)


def parse(text: str) -> dict[str, Computation]:
    """Return the computations of a program, by name."""
    found: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) .*->", line)):
                current = found[header[2]] = Computation(header[2], bool(header[1]))
        elif re.match(r"\}(, execution_thread=.*)?$", line):
            current = None
        elif match := _OP.fullmatch(line):
            root, name, shape, kind, inside, attributes = match.groups()
            current.ops.append(Op(name, shape, kind, inside, attributes, bool(root)))
        elif current.ops:  # an attribute of several lines
            current.ops[-1].attributes += line
    for computation in found.values():
        by_name = {op.name: op for op in computation.ops}
        for op in computation.ops:
            names = re.findall(r"%([\w.\-]+)", op.inside) if op.kind != "constant" else []
            op.operands = [by_name[name] for name in names if name in by_name]
            for operand in dict.fromkeys(op.operands):
                operand.users.append(op)
            called = [name for value in _CALLED.findall(op.attributes) for name in re.findall(r"[\w.\-]+", value)]
            op.called = [found[name] for name in called if name in found]
    return found


def trip_count(loop: Op) -> int | None:
    """Return how often a loop's body runs; None if the text does not tell."""
    if known := loop.find(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    condition, body = (computation.root for computation in loop.called)

    def at_start(i: int) -> int:
        return _evaluate(loop.operands[0].operands[i], dict[int, int]().__getitem__)  # raises for the step's arguments

    try:
        left = _evaluate(condition, at_start)
        step = _evaluate(condition, lambda i: _evaluate(body.operands[i], at_start)) - left
        return max(-(left // step), 0)
    except (ValueError, KeyError, IndexError, ZeroDivisionError):
        return None


def _evaluate(op: Op, argument: Callable[[int], int]) -> int:
    """Return the value of an integer, given the arguments of its computation.

    The value of a comparison is how far its sides are from where it becomes false.
    Raises ValueError, KeyError or IndexError for what is not computed from constants and arguments.
    """
    operands = op.operands
    match op.kind:
        case "constant":
            return int(op.inside)
        case "parameter":
            return argument(int(op.inside))
        case "get-tuple-element" if operands[0].kind == "parameter":  # of the loop's state
            return argument(int(op.find(r"index=(\d+)")))
        case "copy" | "bitcast" | "convert" | "copy-start" | "copy-done":
            return _evaluate(operands[0], argument)
        case "add":
            return _evaluate(operands[0], argument) + _evaluate(operands[1], argument)
        case "compare":
            beyond = {"LT": 0, "LE": 1, "GT": 0, "GE": -1, "NE": 0}[op.find(r"direction=(\w+)")]
            return _evaluate(operands[0], argument) - _evaluate(operands[1], argument) - beyond
        case "fusion":
            return _evaluate(op.called[0].root, lambda i: _evaluate(operands[i], argument))
    raise ValueError(f"{op.name} is {op.kind}")


def _stacked_bytes(loop: Op) -> int:
    """Return the bytes of the arrays that a loop fills by one slice in each iteration."""
    result, trips = loop.called[1].root, trip_count(loop)
    if result.kind != "tuple":
        return 0
    changed = (
        array
        for i, (array, made) in enumerate(zip(loop.arrays, result.operands, strict=False))
        if not (made.kind == "get-tuple-element" and made.find(r"index=(\d+)") == str(i))
    )
    return hbm_bytes([array for array in changed if len(array.dims) > 1 and array.dims[0] == trips])


def _regions(body: Computation, runs: int, devices: int, started: frozenset[str]) -> Iterator[Region]:
    """Yield a computation's region and those of its loops.

    `started` are the channels of collectives that started outside of this loop and continue beside its work.
    """
    region, computations = Region(body.name, runs), [body]
    for computation in computations:
        found = _collectives(computation, runs, devices)
        region.collectives += [each for each in found if each.channel not in started]
        for op in computation.ops:
            region.flops += _flops(op)
            region.memory_bytes += _memory_bytes(op)
            if op.kind in ("call", "conditional"):
                computations += op.called
    yield region
    started |= {each.channel for each in region.collectives if each.asynchronous and each.channel}
    for loop in (op for computation in computations for op in computation.ops if op.kind == "while"):
        yield from _regions(loop.called[1], runs * (trip_count(loop) or 1), devices, started)


def _flops(op: Op) -> float:
    """Return the FLOPs of matrix products and convolutions; all else is small beside them, or bound by memory."""
    if op.kind == "dot":
        left = op.operands[0].arrays[0].dims
        contracted = [left[d] for d in _ints(op.find(r"lhs_contracting_dims=\{([\d,]*)\}"))]
        return 2.0 * math.prod(op.arrays[0].dims) * math.prod(contracted)
    if op.kind == "convolution":
        return _convolution_flops(op)
    if "tpu_custom_call" in op.attributes and (kernel := op.find(r"splash_mha_(fwd|dq|dkv)")):
        return {"fwd": 2, "dq": 3, "dkv": 4}[kernel] * _splash_flops(op)  # matmuls for each block
    if "tpu_custom_call" in op.attributes and (counted := op.find(r'"cost_estimate":\{"flops":"(\d+)"')):
        return float(counted)  # by who wrote the kernel
    if op.kind in ("fusion", "async-start", "custom-call"):
        return sum(sum(map(_flops, computation.ops)) for computation in op.called)
    return 0.0


def _splash_flops(op: Op) -> float:
    """Return the FLOPs of one matrix product of queries and keys in a kernel of JAX's splash attention.

    The kernel skips the empty blocks of its mask. Its first argument has a row for each block of queries, as wide as
    the most blocks of keys that any of them attends to (for "dkv", queries and keys are swapped). The mask is causal,
    perhaps with a window: a block of queries attends to the blocks just before it and to its own.
    """
    grid, *arrays = (array for operand in op.operands for array in operand.arrays)
    blocks, most = max(grid.dims[1:]), min(grid.dims[1:])
    visited = sum(min(i + 1, most) for i in range(blocks))
    queries = (array.dims for array in arrays if array.dtype in ("bf16", "f32") and len(array.dims) >= 3)
    *heads, length, head_dim = max(queries, key=math.prod)
    return 2.0 * math.prod(heads) * head_dim * visited * (length // blocks) ** 2


def _convolution_flops(op: Op) -> float:
    """Return 2 * multiplications, without those by padding or by the holes of a dilation, as XLA counts."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if not labels:
        return 0.0
    left, right, out = labels.groups()
    inputs, kernel = (operand.arrays[0].dims for operand in op.operands[:2])
    result = op.arrays[0].dims
    window = dict(re.findall(r"(\w+)=([\w\-x]+)", op.find(r"window=\{([^}]*)\}")))
    products = 1
    for i, dim in enumerate(sorted(filter(str.isdigit, out))):
        size, stride, left_step, right_step = (
            _ints(window[name])[i] if name in window else 1 for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        pad = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        outputs = np.arange(result[out.index(dim)]) * stride
        at = np.add.outer(outputs, np.arange(size) * right_step) - pad
        last = (inputs[left.index(dim)] - 1) * left_step
        products *= int(((at >= 0) & (at <= last) & (at % left_step == 0)).sum())
    return 2.0 * products * result[out.index("b")] * result[out.index("f")] * kernel[right.index("i")]


_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "copy-done", "slice-done", "async-done", "async-update", "opt-barrier",
    "add-dependency", "domain", "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv",
    "recv-done",
}  # fmt: skip


def _memory_bytes(op: Op) -> int:
    """Return the bytes to and from main memory: of what is only sliced or updated in place, those of that part."""
    if op.kind in _MOVES_NOTHING:
        return 0
    if op.kind in ("fusion", "async-start"):
        return _fusion_bytes(op)
    if op.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * hbm_bytes(op.arrays)
    if op.kind in ("dynamic-update-slice", "scatter"):
        return 2 * op.operands[1 if op.kind == "dynamic-update-slice" else -1].bytes
    read = sum(hbm_bytes(operand.arrays) for operand in set(op.operands))
    if op.kind in ("copy-start", "slice-start"):
        made = op.arrays[0 if op.kind == "copy-start" else 1]  # of (result, operand, …) and ((operand), result, …)
        return min(read, made.bytes) + hbm_bytes([made])
    # What starts a collective returns (operand, result).
    return read + hbm_bytes(op.arrays[1:2] if op.kind.endswith("-start") and len(op.arrays) > 1 else op.arrays)


def _fusion_bytes(fusion: Op) -> int:
    total = sum(min(_bytes_read(p), hbm_bytes(operand.arrays)) for p, operand in _parameters(fusion))
    root = fusion.called[0].root
    for array, result in zip(fusion.arrays, root.operands if root.kind == "tuple" else [root], strict=False):
        while result.kind in ("bitcast", "reshape", "copy"):
            result = result.operands[0]
        if not array.on_chip and result.kind != "parameter":
            total += result.operands[1].bytes if result.kind == "dynamic-update-slice" else array.bytes
    return total


def _parameters(fusion: Op) -> list[tuple[Op, Op]]:
    """Return the parameters of a fusion's computation with the operands that they stand for."""
    return [(op, fusion.operands[int(op.inside)]) for op in fusion.called[0].ops if op.kind == "parameter"]


def _bytes_read(op: Op) -> int:
    """Return the bytes that a fusion reads of an array: those of its slices, if it only slices it."""
    total = 0
    for user in op.users:
        if user.kind in ("bitcast", "reshape"):
            total += _bytes_read(user)
        elif user.kind in ("dynamic-slice", "gather", "slice") and user.operands[0] is op:
            total += user.bytes
        elif not (user.kind == "dynamic-update-slice" and user.operands[0] is op):
            return op.bytes
    return total


_COMPUTES = ("fusion", "convolution", "dot", "custom-call", "while")


def _collectives(body: Computation, runs: int, devices: int) -> Iterator[Collective]:
    """Yield the collectives of a computation and its fusions, each once even if it is done in several steps."""
    fused: dict[str, Collective] = {}
    for i, op in enumerate(body.ops):
        if op.kind == "send":
            yield _between_slices(body.ops, i, runs)
        elif op.is_collective or op.kind == "async-start":
            started = op.kind.endswith("-start")
            overlapped = started and _computes_until_done(body.ops, i)
            for each in [op] if op.is_collective else [inner for inner in op.called[0].ops if inner.is_collective]:
                yield replace(_collective(each, runs, devices, started, overlapped), sliced=_is_sliced(each))
        elif op.kind == "fusion":
            computes = any(inner.kind in ("convolution", "dot", "fusion") for inner in op.called[0].ops)
            for each in filter(lambda inner: inner.is_collective, _fused_ops(op.called[0])):
                # The steps of a collective have one channel: its start, those beside computations, its end.
                in_steps = "async_collective" in op.called[0].name or "chain_id" in each.attributes
                found = _collective(each, runs, devices, in_steps, in_steps and computes)
                if found.kind == "all-reduce" and not each.root and {u.kind for u in each.users} == {"dynamic-slice"}:
                    part = sum(user.bytes for user in each.users)  # each device keeps its own
                    found = replace(found, kind="reduce-scatter", result_bytes=part)
                if found.overlapped or (found.channel or each.name) not in fused:
                    fused[found.channel or each.name] = found
    yield from fused.values()


def _fused_ops(fused: Computation) -> Iterator[Op]:
    for op in fused.ops:
        yield op
        if op.kind == "fusion":
            yield from _fused_ops(op.called[0])


def _collective(op: Op, runs: int, devices: int, asynchronous: bool, overlapped: bool) -> Collective:
    kind, arrays = _COLLECTIVES[op.kind.removesuffix("-start")], op.arrays
    if kind in ("all-gather", "collective-permute") and op.kind.endswith("-start") and len(arrays) > 1:
        number = max(len(op.operands), 1)  # of (operands, results, flags)
        arrays = arrays[number : 2 * number]
    dtype = max(arrays, key=lambda array: array.bytes).dtype
    size, channel = sum(array.bytes for array in arrays), op.find(r"channel_id=(\d+)")
    groups = groups_of(op.attributes, devices)
    return Collective(kind, dtype, size, groups, runs, asynchronous, overlapped, channel=channel)


def _between_slices(ops: list[Op], start: int, runs: int) -> Collective:
    """Read a collective between slices, which hosts perform: the chip sends its part and later receives the result."""
    send = ops[start]
    kind = send.find(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
    rendezvous = send.find(r'(_xla_host_transfer_rendezvous="[^"]+")')
    received = [op for op in ops[start:] if op.kind == "recv-done" and rendezvous in op.operands[0].attributes]
    overlapped = bool(received) and any(op.kind in _COMPUTES for op in ops[start : ops.index(received[0])])
    part = send.arrays[0]
    return Collective(_COLLECTIVES.get(kind, "collective-permute"), part.dtype, part.bytes, (), runs, True, overlapped)


def _computes_until_done(ops: list[Op], start: int) -> bool:
    """Tell whether anything is computed between an operation's start and its end, in the order of the schedule."""
    waiting = {ops[start]}
    for op in ops[start + 1 :]:
        if waiting & set(op.operands):
            if op.kind.endswith("-done"):
                return False
            waiting.add(op)
        elif op.kind in _COMPUTES:
            return True
    return False


def _is_sliced(op: Op) -> bool:
    """Tell whether only parts of an all-reduce's results are used, apart from small results."""
    if op.kind != "all-reduce" or op.root:
        return False
    results = [op] if len(op.arrays) == 1 else [user for user in op.users if 16 * user.bytes > op.bytes]
    return bool(results) and all(_uses_a_part(user, result) for result in results for user in result.users)


def _uses_a_part(user: Op, result: Op) -> bool:
    if user.kind == "fusion":
        return all(2 * _bytes_read(p) <= result.bytes for p, operand in _parameters(user) if operand is result)
    return user.kind in ("dynamic-slice", "bitcast")


def groups_of(text: str, devices: int) -> Groups:
    """Read a collective's groups of devices, or pairs for a permutation, in any of the forms that XLA writes."""
    everyone = (tuple(range(devices)),)
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text):
        return tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]+)\}", match[1])) or everyone
    parts: list[tuple[bool, int]] = []  # (whether a group extends along it, size) of each axis, or part of an axis
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        parts = [(False, int(match[1])), (True, int(match[2]))]
    elif match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", text):
        for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1]):
            # For a part of an axis XLA gives the product of the axis's sizes before it, and its own.
            chosen, before = re.findall(rf"'{axis}'(?::\((\d+)\)(\d+))?", match[2]), 1
            for start, number in sorted((int(first or 1), int(second or size)) for first, second in chosen):
                parts += [(False, start // before), (True, number)]
                before = start * number
            parts.append((False, int(size) // before))
    else:
        return everyone
    sizes = [size for _, size in parts]
    ids = np.arange(math.prod(sizes))
    if match := re.search(r"replica_groups=[^ ]*?(?:<=|, device_ids=\()\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = ids.reshape(_ints(match[1]))
        ids = ids.transpose(_ints(match[2])) if match[2] else ids
    order = sorted(range(len(parts)), key=lambda i: parts[i][0])
    group = math.prod(size for within, size in parts if within)
    return tuple(map(tuple, ids.reshape(sizes).transpose(order).reshape(-1, group).tolist()))
