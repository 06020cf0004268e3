"""`jax-it plan`: what training needs and how fast it can be, on chips that are not attached."""

import dataclasses
from collections.abc import Iterator
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
from jax_it.plan.program import Program, read
from jax_it.plan.topology import Topology
from jax_it.training.throughput import step_flops

RESERVED = 1 << 28  # bytes of a TPU's memory that its runtime keeps: XLA counts 15.75 GiB on a v5e
MAX_TRIES = 4  # settings to compile if those of the config do not fit


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    parameters: int
    frozen: int
    optimizer: int
    batch: int  # and counters
    activations: int  # kept for the backward pass
    gradients: int
    other: int  # temporary arrays, results beside the state, padding
    code: int
    total: int
    limit: int  # 0 if not known
    reserved: int = 0  # of the limit

    @property
    def fits(self) -> bool:
        return not self.limit or self.total <= self.limit - self.reserved


@dataclass(frozen=True)
class Try:
    """Settings that were tried because those of the config do not fit."""

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
    model_flops: float  # of a step, over all chips
    hardware_flops: float  # as compiled; 0, as all that follows, if the compiler refused
    memory_bytes: int  # moved to and from main memory by a chip in a step
    traffic: list[cost.Traffic]
    regions: list[cost.RegionTime]
    unknown_trip_counts: list[str]  # loops that count once
    seconds: float  # the bound; 0 if the chip's rates are not known
    utilization: float
    compile_seconds: float
    compile_work: float  # seconds summed over processor cores
    tries: list[Try]

    @property
    def fits(self) -> bool:
        return self.memory.fits


def plan(config: Config, topology: Topology, rows: int = 0, hlo_file: Path | epath.Path | None = None) -> Plan:
    """Compile the step. If it does not fit, compile it with other settings until it does.

    `rows` is the number of rows of a step (default: `train.batch_size`), all of them full. The text of the compiled
    program is written to `hlo_file` (see `files.locate_output`).
    """
    step = build_step(config, topology, rows)
    memory, program, compiled = _compile(step, topology, hlo_file)
    devices, shape, model = list(step.mesh.devices.flat), step.shape, step.model
    traffic, regions = cost.of_program(program, topology, devices)
    seconds = sum(region.seconds for region in regions)
    model_flops = step_flops(model, step.rows, shape)
    source = "" if model.kind == "causal" else f"{shape.blocks} x {shape.source} + "
    mesh = {axis: int(size) for axis, size in step.mesh.shape.items() if size > 1}
    return Plan(
        topology=topology.name, chip=topology.chip.name, devices=len(devices), slices=topology.slices, mesh=mesh,
        model=str(model.values.get("model_type")), parameters=model.parameter_count, trained=model.trained_count,
        rows=step.rows, row=f"{source}{shape.target} tokens",
        tokens=step.rows * (shape.blocks * shape.source + shape.target),
        memory=memory, model_flops=model_flops,
        hardware_flops=len(devices) * sum(region.flops * region.runs for region in program.regions),
        memory_bytes=sum(region.memory_bytes * region.runs for region in program.regions),
        traffic=traffic, regions=regions, unknown_trip_counts=program.unknown_trip_counts, seconds=seconds,
        utilization=model_flops / (seconds * len(devices) * topology.chip.flops) if seconds else 0.0,
        compile_seconds=compiled.seconds if compiled else 0.0, compile_work=compiled.cpu_seconds if compiled else 0.0,
        tries=[] if memory.fits else list(_search(step, topology, rows, mesh)),
    )  # fmt: skip


def _compile(
    step: Step, topology: Topology, hlo_file: Path | epath.Path | None = None
) -> tuple[Memory, Program, Compiled | None]:
    """Return (the memory that the step needs, its program, the compiler's result), the last two empty if refused."""
    memory = _state(step, topology)
    try:
        compiled = compile_step(step)
    except TooLarge as error:  # the compiler counts only its temporary arrays
        return dataclasses.replace(memory, other=error.needed, total=memory.total + error.needed), Program(), None
    if hlo_file:
        write_output(hlo_file, compiled.text, "--hlo")
    program = read(compiled.text, step.mesh.size)
    gradients = program.gradient_bytes
    if step.config.train.gradient_accumulation_steps > 1:  # their sums, beside what the layers' loop produces
        gradients = max(gradients, memory.parameters)
    activations = min(program.activation_bytes, compiled.temporary_bytes)
    gradients = min(gradients, compiled.temporary_bytes - activations)
    other = compiled.total_bytes - compiled.code_bytes - memory.total - activations - gradients
    memory = dataclasses.replace(
        memory, activations=activations, gradients=gradients, other=other,
        code=compiled.code_bytes, total=compiled.total_bytes,
    )  # fmt: skip
    return memory, program, compiled


def _state(step: Step, topology: Topology) -> Memory:
    """Return what the step's arguments take, by their shapes and shardings."""
    shapes, shardings = step.prepared.shapes, step.prepared.shardings
    rows = step.rows // sharding.batch_parts(step.mesh)
    batch = sum(leaf.dtype.itemsize * leaf.size // leaf.shape[0] * rows for leaf in jax.tree.leaves(step.batch))
    parameters, frozen, optimizer = (
        bytes_of(getattr(shapes, name), getattr(shardings, name)) for name in ("params", "frozen", "optimizer")
    )
    total = bytes_of(shapes, shardings) + batch
    return Memory(
        parameters, frozen, optimizer, total - parameters - frozen - optimizer,
        activations=0, gradients=0, other=0, code=0, total=total,
        limit=topology.chip.memory, reserved=RESERVED if topology.is_tpu else 0,
    )  # fmt: skip


def _search(step: Step, topology: Topology, rows: int, mesh: dict[str, int]) -> Iterator[Try]:
    """Try settings that take less memory, each added to those before it, until a step fits."""
    config, compiled = step.config, 0
    settings: dict[str, Any] = {}
    for change in _changes(step, topology, mesh):
        for name, value in change.items():
            config = _replace(config, name.split("."), value)
        settings |= change
        changed = build_step(config, topology, 0 if "train.batch_size" in settings else rows)
        if compiled < MAX_TRIES and _state(changed, topology).fits:  # else there is no need to compile
            compiled += 1
            memory, _, _ = _compile(changed, topology)
            yield Try(dict(settings), memory.total, memory.fits)
            if memory.fits:
                return


def _changes(step: Step, topology: Topology, mesh: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield changes of settings, from those that leave the results as they are to those that do not."""
    model, train = step.config.model, step.config.train
    if model.remat == "none":
        yield {"model.remat": "layer"}
    if mesh.get("data", 1) > topology.slices:
        yield {"mesh.data": topology.slices, "mesh.fsdp": -1}
    parts = len(topology.devices) // (mesh.get("context", 1) * mesh.get("tensor", 1))
    rows, accumulation_steps = max(step.rows // parts, 1), train.gradient_accumulation_steps
    while accumulation_steps < rows:
        accumulation_steps = min(accumulation_steps * 4, rows)
        yield {"train.gradient_accumulation_steps": accumulation_steps}
    if train.optimizer.name == "adamw":
        yield {"train.optimizer.name": "adafactor"}
    if model.param_dtype == "float32":
        yield {"model.param_dtype": "bfloat16"}
    if rows > 1:
        yield {"train.batch_size": parts, "train.gradient_accumulation_steps": 1}


def _replace(settings: Any, path: list[str], value: Any) -> Any:
    """Return a config with the setting at a path such as ["train", "batch_size"] changed."""
    inner = value if len(path) == 1 else _replace(getattr(settings, path[0]), path[1:], value)
    return dataclasses.replace(settings, **{path[0]: inner})
