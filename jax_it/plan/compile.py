"""The train step of a config, compiled for a topology from shapes alone."""

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_it import sharding
from jax_it.config import Config
from jax_it.data.packing import Shape
from jax_it.errors import UserError, first_line
from jax_it.models import Model
from jax_it.plan.published import PUBLISHED
from jax_it.plan.topology import Topology
from jax_it.pretrained import load_model
from jax_it.pretrained.storage import cast_or_quantize, storage_dtypes
from jax_it.run import format_of
from jax_it.training.step import PreparedStep, prepare


@dataclass
class TooLarge(Exception):
    """The compiler refused: a chip's memory does not hold what the step needs beside its arguments."""

    needed: int  # bytes
    limit: int


@dataclass(frozen=True)
class Step:
    """The training loop's own step and the shapes that it is called with, not compiled yet."""

    config: Config
    model: Model
    mesh: jax.sharding.Mesh
    prepared: PreparedStep
    batch: Any  # of ShapeDtypeStructs
    shape: Shape  # of a row
    rows: int


def build_step(config: Config, topology: Topology, rows: int = 0) -> Step:
    """Return the step that training would run on the topology.

    Its rows are as long as the config allows. Their number, by default `batch_size`, is padded as in training to what
    divides over the mesh and the micro-batches.
    """
    config = with_dtype(config, topology)
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    # The devices cannot compute: what JAX evaluates while it traces must go to the CPU.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = find_model(config, topology)
        frozen: Any = {}
        if model.adapter is not None:
            dtypes = storage_dtypes(model, config.model)
            frozen = jax.eval_shape(lambda key: cast_or_quantize(model.init(key), dtypes), jax.random.key(0))
        # The length of the learning rate's schedule does not change the program.
        prepared = prepare(model, config, mesh, frozen, 1000, 10, 10)
        data, form = config.data, format_of(model, pad=0)  # full rows have no padding
        shape = form.smallest(data)
        if model.kind == "seq2seq" and data.packing and data.packed_source_length:
            blocks = data.packed_source_length // data.max_source_length
            shape = Shape(blocks, data.max_source_length, data.packed_target_length)
        multiple = sharding.batch_parts(mesh) * config.train.gradient_accumulation_steps
        number = math.ceil((rows or config.train.batch_size) / multiple) * multiple
        positions = number * max(shape.blocks * shape.source, shape.target)
        if positions >= 1 << 31:
            raise UserError(
                f"a step of {number} rows has {positions} positions, more than XLA can count; use fewer rows"
            )
        batch = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((number, *array.shape[1:]), array.dtype), form.batch([[]], shape)
        )
    return Step(config, model, mesh, prepared, batch, shape, number)


def with_dtype(config: Config, topology: Topology) -> Config:
    """Return the config with the dtype that the topology computes in."""
    if config.model.dtype == "auto" and topology.is_tpu:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    return config


def find_model(config: Config, topology: Topology) -> Model:
    """Return the model that training would load, without its weights: of a model on the hub, config.json is enough."""
    model, path = config.model, config.model.path
    if model.lora.path:
        raise UserError("config.model.lora.path: a plan needs the adapters' settings; give lora.rank instead")
    if path in PUBLISHED:
        model = dataclasses.replace(model, path="", architecture={**PUBLISHED[path], **model.architecture})
    elif path and not Path(path).is_dir():
        import huggingface_hub  # slow to import, and rarely needed

        try:
            folder = str(Path(huggingface_hub.hf_hub_download(path, "config.json")).parent)
        except Exception as error:
            if "model_type" not in model.architecture:
                raise UserError(
                    f"config.model.path: {path} is not a folder, and its config.json could not be fetched "
                    f"({first_line(error)}); give the values as config.model.architecture"
                ) from None
            folder = ""
        model = dataclasses.replace(model, path=folder)
    found = load_model(model)
    if model.new_tokens:  # as if no row were to spare: the tokenizer may not be at hand
        size = found.config.vocab_size
        found = load_model(model, range(size, size + len(model.new_tokens)))
    if config.model.attention == "auto":
        options = found.options._replace(fused_attention=topology.is_tpu, recompute=not topology.is_tpu)
        return dataclasses.replace(found, options=options)
    return found


def bytes_of(shapes: Any, shardings: Any) -> int:
    """Return the bytes on one device of arrays with these shapes and shardings, without padding."""
    leaves = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    pairs = zip(jax.tree.leaves(shapes), leaves, strict=True)
    return sum(math.prod(each.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf, each in pairs)


@dataclass(frozen=True)
class Compiled:
    text: str  # HLO
    seconds: float  # of compiling
    cpu_seconds: float  # the same, summed over processor cores
    total_bytes: int  # on one device
    temporary_bytes: int
    code_bytes: int


def compile_step(step: Step) -> Compiled:
    """Trace and compile a step. Raises TooLarge if the compiler says that it does not fit."""
    with jax.sharding.use_abstract_mesh(step.mesh.abstract_mesh):
        return compile_lowered(step.prepared.step.lower(step.prepared.shapes, step.batch))  # type: ignore[attr-defined]


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    """Compile a program. Raises TooLarge if the compiler says that it does not fit."""
    began, worked = time.perf_counter(), time.process_time()
    try:
        compiled: Any = lowered.compile()
    except Exception as error:
        if found := _too_large(str(error)):
            raise found from None
        raise
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    sizes = compiled.memory_analysis()
    state = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    temporary, code = sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes
    return Compiled(compiled.as_text(), seconds, cpu_seconds, state + temporary + code, temporary, code)


def _too_large(message: str) -> TooLarge | None:
    size = r"([\d.]+)([KMGT])"
    match = re.search(rf"\({size}\) exceeds available HBM \({size}\)|Used {size} of {size} hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        return None
    number, unit, limit, limit_unit = (group for group in match.groups() if group)
    units = {letter: 1 << 10 * (i + 1) for i, letter in enumerate("KMGT")}
    return TooLarge(int(float(number) * units[unit]), int(float(limit) * units[limit_unit]))
