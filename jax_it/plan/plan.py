"""`jax-it plan`: what training would need and how fast it could be, on chips that are not there."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jax_it import sharding
from jax_it.config import Config
from jax_it.files import write_output
from jax_it.plan import cost
from jax_it.plan.compile import Compiled, Step, TooLarge, build_step, bytes_of, compile_step
from jax_it.plan.cost import Share, Traffic
from jax_it.plan.program import Program
from jax_it.plan.topology import Topology
from jax_it.training.throughput import step_flops

RESERVED = 1 << 28  # bytes of a TPU's memory that its runtime keeps: XLA counts 15.75 GiB on a v5e
TRIES = 4  # compiled settings, where those of the config do not fit


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    parameters: int
    frozen: int
    optimizer: int
    batch: int  # and counters
    activations: int  # kept from the forward for the backward pass
    gradients: int
    other: int  # temporary, what is returned beside the state, and padding
    code: int
    total: int
    limit: int  # 0: not known
    reserved: int = 0  # of the limit

    @property
    def fits(self) -> bool:
        return not self.limit or self.total <= self.limit - self.reserved


@dataclass(frozen=True)
class Try:
    """Settings that were compiled because those of the config do not fit."""

    settings: dict[str, Any]
    total: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    topology: str
    chip: str
    devices: int
    slices: int
    mesh: dict[str, int]
    model: str
    parameters: int
    trained: int
    rows: int
    row: str
    tokens: int  # positions, padding included
    memory: Memory
    model_flops: float  # a step, over all chips
    hardware_flops: float
    memory_bytes: int  # a chip and step
    traffic: list[Traffic]
    regions: list[Share]
    endless: list[str]  # loops whose number of turns is not known: they count once
    seconds: float  # the bound; 0 where the chip's rates are not known
    utilisation: float
    compile_seconds: float
    compile_work: float  # in seconds of one processor core
    tries: list[Try]

    @property
    def fits(self) -> bool:
        return self.memory.fits


def plan(config: Config, topology: Topology, rows: int = 0, hlo_file: Path | epath.Path | None = None) -> Plan:
    """Compiles the step; where it does not fit, looks for settings of which it does, by compiling those too.

    `rows` are those of a step, 0 for `train.batch_size` full ones; `hlo_file` (see `files.locate_output`) gets the
    compiled program's text.
    """
    step = build_step(config, topology, rows)
    try:
        compiled = compile_step(step)
        if hlo_file:
            write_output(hlo_file, compiled.text, "--hlo")
        found = _measure(step, topology, compiled)
    except TooLarge as error:
        found = _without_program(step, topology, error)
    if found.fits:
        return found
    return dataclasses.replace(found, tries=list(_search(config, topology, rows, found)))


def _measure(step: Step, topology: Topology, compiled: Compiled) -> Plan:
    devices = list(step.mesh.devices.flat)
    program = Program.of(compiled.text, len(devices))
    activations, gradients = program.kept
    if step.config.train.micro_batches > 1:  # whole sums, beside what the layers' loop makes
        gradients = max(gradients, _gradient_bytes(step))
    activations = min(activations, compiled.temporary)
    gradients = min(gradients, compiled.temporary - activations)
    state = _state(step, topology)
    memory = dataclasses.replace(
        state,
        activations=activations,
        gradients=gradients,
        other=compiled.total - compiled.code - state.total - activations - gradients,
        code=compiled.code,
        total=compiled.total,
    )
    moved = cost.traffic(program, topology, devices)
    regions = cost.shares(program, topology, devices)
    seconds = sum(region.seconds for region in regions)
    plan = _without_program(step, topology, None)
    chip = topology.chip
    return dataclasses.replace(
        plan,
        memory=memory,
        hardware_flops=len(devices) * sum(region.flops * region.runs for region in program.regions),
        memory_bytes=sum(region.memory_bytes * region.runs for region in program.regions),
        traffic=moved,
        regions=regions,
        endless=program.endless,
        seconds=seconds,
        utilisation=plan.model_flops / (seconds * len(devices) * chip.flops) if seconds and chip else 0.0,
        compile_seconds=compiled.seconds,
        compile_work=compiled.work,
    )


def _state(step: Step, topology: Topology) -> Memory:
    """What the step's arguments take, by their shapes and placements."""
    shapes, places = step.prepared.shapes, step.prepared.shardings
    rows = step.rows // sharding.batch_parts(step.mesh)
    batch = sum(leaf.dtype.itemsize * leaf.size // leaf.shape[0] * rows for leaf in jax.tree.leaves(step.batch))
    parts = {
        "parameters": bytes_of(shapes.params, places.params),
        "frozen": bytes_of(shapes.frozen, places.frozen),
        "optimizer": bytes_of(shapes.optimizer, places.optimizer),
    }
    everything = bytes_of(shapes, places)
    limit = topology.chip.memory if topology.chip else 0
    return Memory(
        **parts,
        batch=batch + everything - sum(parts.values()),
        activations=0, gradients=0, other=0, code=0, total=everything + batch, limit=limit,
        reserved=RESERVED if topology.is_tpu else 0,
    )  # fmt: skip


def _gradient_bytes(step: Step) -> int:
    return bytes_of(step.prepared.shapes.params, step.prepared.shardings.params)


def _without_program(step: Step, topology: Topology, error: TooLarge | None) -> Plan:
    """What is known before, or without, a compiled program."""
    memory = _state(step, topology)
    if error:
        # The compiler counts its temporaries alone.
        memory = dataclasses.replace(memory, other=error.needed, total=memory.total + error.needed)
    shape, model = step.shape, step.model
    source = "" if model.kind == "causal" else f"{shape.blocks} x {shape.source} + "
    return Plan(
        topology=topology.name,
        chip=topology.chip.name if topology.chip else topology.devices[0].device_kind,
        devices=len(topology.devices),
        slices=topology.slices,
        mesh={axis: int(size) for axis, size in step.mesh.shape.items() if size > 1},
        model=str(model.values.get("model_type")),
        parameters=model.parameter_count,
        trained=model.trained_count,
        rows=step.rows,
        row=f"{source}{shape.target} tokens",
        tokens=step.rows * (shape.blocks * shape.source + shape.target),
        memory=memory,
        model_flops=step_flops(model, step.rows, shape),
        hardware_flops=0.0, memory_bytes=0, traffic=[], regions=[], endless=[], seconds=0.0, utilisation=0.0,
        compile_seconds=0.0, compile_work=0.0, tries=[],
    )  # fmt: skip


def _search(config: Config, topology: Topology, rows: int, found: Plan) -> Any:
    """Settings tried in turn, each together with those before it, until they fit: least harm to the run first."""
    tried: dict[str, Any] = {}
    compiled = 0
    for change in _changes(config, found):
        tried = tried | change
        changed = _with(config, tried)
        step = build_step(changed, topology, _rows_of(rows, changed, tried))
        state = _state(step, topology)
        if not state.fits or compiled == TRIES:
            continue  # the state alone is too large: no need to compile
        compiled += 1
        try:
            memory = _measure(step, topology, compile_step(step)).memory
        except TooLarge as error:
            memory = dataclasses.replace(state, other=error.needed, total=state.total + error.needed)
        yield Try(dict(tried), memory.total, memory.fits)
        if memory.fits:
            return


def _rows_of(rows: int, config: Config, tried: dict[str, Any]) -> int:
    return config.train.batch_size if "train.batch_size" in tried else rows


def _changes(config: Config, found: Plan) -> list[dict[str, Any]]:
    """What may lessen a chip's memory, from what changes nothing in what is learnt to what does."""
    model, train, mesh = config.model, config.train, found.mesh
    changes: list[dict[str, Any]] = []
    if model.remat == "none":
        changes.append({"model.remat": "layer"})
    if mesh.get("data", 1) > found.slices:
        changes.append({"mesh.data": found.slices, "mesh.fsdp": -1})
    parts = found.devices // max(mesh.get("context", 1) * mesh.get("tensor", 1), 1)
    each = max(found.rows // parts, 1)
    micro = train.micro_batches
    most = max(each, 1)
    while micro < most:
        micro = min(micro * 4, most)
        changes.append({"train.micro_batches": micro})
    if train.optimizer.name == "adamw":
        changes.append({"train.optimizer.name": "adafactor"})
    if model.param_dtype == "float32":
        changes.append({"model.param_dtype": "bfloat16"})
    if each > 1:
        changes.append({"train.batch_size": parts, "train.micro_batches": 1})
    return changes


def _with(config: Config, changes: dict[str, Any]) -> Config:
    for name, value in changes.items():
        config = _replace(config, name.split("."), value)
    return config


def _replace(settings: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _replace(getattr(settings, path[0]), path[1:], value)
    return dataclasses.replace(settings, **{path[0]: inner})
