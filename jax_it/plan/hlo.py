"""The text of a compiled program, as computations and their instructions."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


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


def read_of(inner: Computation, name: str) -> int:
    """Bytes that a fusion reads of its parameter: those of its slices, if it only slices it."""
    total = 0
    for user in inner.users.get(name, []):
        if user.kind in ("bitcast", "reshape"):
            total += read_of(inner, user.name)
        elif user.kind in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
            total += user.bytes
        elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
            pass
        else:
            return inner.by_name[name].bytes
    return total
