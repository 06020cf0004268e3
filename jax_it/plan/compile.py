"""The train step of a config, compiled for a topology from shapes alone."""

import dataclasses
import json
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
from jax_it.data.formats import CausalFormat, Format, Seq2SeqFormat
from jax_it.data.packing import Shape
from jax_it.errors import UserError, first_line
from jax_it.models import Model, build
from jax_it.plan.published import PUBLISHED
from jax_it.plan.topology import Topology
from jax_it.pretrained import add_adapter
from jax_it.pretrained.hf import read_config_json
from jax_it.pretrained.storage import cast_or_quantize, storage_dtypes
from jax_it.training.step import Prepared, prepare


class TooLarge(Exception):
    """The compiler found that a chip's memory does not hold what the step needs beside its arguments; in bytes."""

    def __init__(self, needed: int, limit: int):
        super().__init__(f"{needed} bytes are needed, {limit} are there")
        self.needed, self.limit = needed, limit


@dataclass(frozen=True)
class Step:
    """A step before it is compiled: the loop's own function, and the shapes that it is called with."""

    config: Config
    model: Model
    mesh: jax.sharding.Mesh
    prepared: Prepared
    batch: Any  # of ShapeDtypeStructs
    shape: Shape  # of a row
    rows: int


def build_step(config: Config, topology: Topology, rows: int = 0) -> Step:
    """The step that training would run on the topology; `rows` are those of a step, 0 for `batch_size` full ones."""
    if config.model.dtype == "auto" and topology.is_tpu:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    # Of the devices nothing is there to compute on: what JAX computes while it traces goes to the CPU.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = find_model(config)
        if config.model.attention == "auto" and topology.is_tpu:
            model = dataclasses.replace(model, options=model.options._replace(fused=True))
        frozen = _frozen_shapes(model, config)
        # Any length of the schedule gives the same program.
        prepared = prepare(model, config, mesh, frozen, 1000, 10, 10)
        form = _format(model)
        shape = row_shape(config, form)
        number = rows_of_a_step(config, mesh, rows)
        positions = number * max(shape.blocks * shape.source, shape.target)
        if positions >= 1 << 31:
            raise UserError(
                f"a step of {number} rows has {positions} positions, more than XLA can count; take fewer rows"
            )
        batch = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((number, *array.shape[1:]), array.dtype), form.batch([[]], shape)
        )
    return Step(config, model, mesh, prepared, batch, shape, number)


def find_model(config: Config) -> Model:
    """The model of a config's architecture, with fresh adapters if it asks for some."""
    if config.model.lora.path:
        raise UserError("config.model.lora.path: a plan needs the adapters' settings; give lora.rank instead")
    values, where = _values(config)
    return add_adapter(build(values, where, config.model), config.model)


def _values(config: Config) -> tuple[dict[str, Any], str]:
    """config.json of the model: of a folder, of a name that is known here, or of the hub, without its weights."""
    path = config.model.path
    if not path or Path(path).is_dir():
        return read_config_json(config.model)
    if path in PUBLISHED:
        return {**PUBLISHED[path], **config.model.architecture}, path
    import huggingface_hub  # slow to import, and needed for names alone

    try:
        file = huggingface_hub.hf_hub_download(path, "config.json")
        return {**json.loads(Path(file).read_text()), **config.model.architecture}, f"{path}/config.json"
    except Exception as error:
        if config.model.architecture.get("model_type"):
            return dict(config.model.architecture), "config.model.architecture"
        raise UserError(
            f"config.model.path: {path} is no folder, and its config.json could not be fetched "
            f"({first_line(error)}); give the values as config.model.architecture"
        ) from None


def _frozen_shapes(model: Model, config: Config) -> Any:
    """The weights that stay as they are, as shapes; none where all are trained."""
    if model.adapter is None:
        return {}
    dtypes = storage_dtypes(model, config.model)
    return jax.eval_shape(lambda key: cast_or_quantize(model.init(key), dtypes), jax.random.key(0))


def _format(model: Model) -> Format:
    if model.kind == "causal":
        return CausalFormat(0, model.options.prefix_lm)
    return Seq2SeqFormat(*model.start_and_pad)


def row_shape(config: Config, form: Format) -> Shape:
    """The longest rows that the config can make without looking at data."""
    data = config.data
    if isinstance(form, Seq2SeqFormat) and data.packing and data.packed_source_length:
        return Shape(data.packed_source_length // data.source_length, data.source_length, data.packed_target_length)
    return form.smallest(data)


def rows_of_a_step(config: Config, mesh: jax.sharding.Mesh, rows: int = 0) -> int:
    """Rows, padded as the loop pads them to what divides over the mesh and the micro-batches."""
    multiple = sharding.batch_parts(mesh) * config.train.micro_batches
    return math.ceil((rows or config.train.batch_size) / multiple) * multiple


def bytes_of(shapes: Any, shardings: Any) -> int:
    """Bytes on one device of arrays with these shapes and placements, without padding."""
    places = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    pairs = zip(jax.tree.leaves(shapes), places, strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf, place in pairs)


@dataclass(frozen=True)
class Compiled:
    text: str
    seconds: float  # of tracing and compiling
    work: float  # the same in seconds of one processor core, however many worked on it beside what else
    arguments: int  # bytes on one device, as are all below
    outputs: int
    aliased: int  # of the outputs: they take the place of arguments
    temporary: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def compile_step(step: Step) -> Compiled:
    """Raises TooLarge where the compiler says so."""
    began, worked = time.perf_counter(), time.process_time()
    with jax.sharding.use_abstract_mesh(step.mesh.abstract_mesh):
        lowered = step.prepared.step.lower(step.prepared.shapes, step.batch)  # type: ignore[attr-defined]
        try:
            compiled = lowered.compile()
        except Exception as error:
            if found := _too_large(str(error)):
                raise found from None
            raise
    seconds, work = time.perf_counter() - began, time.process_time() - worked
    sizes = compiled.memory_analysis()
    return Compiled(
        compiled.as_text(),
        seconds,
        work,
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
    )


def _too_large(message: str) -> TooLarge | None:
    size = r"([\d.]+)([KMGT])"
    match = re.search(rf"\({size}\) exceeds available HBM \({size}\)|Used {size} of {size} hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        return None
    number, unit, most, its = (group for group in match.groups() if group)
    units = {letter: 1 << 10 * (i + 1) for i, letter in enumerate("KMGT")}
    return TooLarge(int(float(number) * units[unit]), int(float(most) * units[its]))
