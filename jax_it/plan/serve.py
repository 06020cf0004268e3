"""`jax-it plan --serve`: what a server needs and how fast it can be, on chips that are not attached."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jax_it import sharding
from jax_it.checkpointing import abstract
from jax_it.config import Config
from jax_it.generation import Engine
from jax_it.models import Params
from jax_it.plan import cost
from jax_it.plan.compile import TooLarge, bytes_of, compile_lowered, find_model, with_dtype
from jax_it.plan.plan import RESERVED
from jax_it.plan.program import read
from jax_it.plan.topology import Topology
from jax_it.pretrained.storage import cast_or_quantize, storage_dtypes


@dataclass(frozen=True)
class Program:
    """What the server runs over and over. A compiler that refused leaves only `temporary`."""

    tokens: int  # that it computes, over all chips
    temporary: int  # bytes of a chip, beside weights and slots
    code: int  # bytes
    seconds: float  # the bound; 0 if the chip's rates are not known
    fits: bool

    @property
    def rate(self) -> float:
        """Tokens per second at most."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class ServePlan:
    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    model: str
    parameters: int
    slots: int  # over all chips
    max_prompt_tokens: int
    max_new_tokens: int
    weights: int  # bytes of a chip: as loaded, and as prepared for decoding
    slots_bytes: int  # of a chip: keys and values, and texts
    prefill: Program
    decode: Program  # one step of all slots
    limit: int  # bytes of a chip; 0 if not known
    reserved: int  # of the limit

    @property
    def total(self) -> int:
        """Bytes of a chip while the larger program runs."""
        programs = self.prefill, self.decode
        return self.weights + self.slots_bytes + max(p.temporary for p in programs) + sum(p.code for p in programs)

    @property
    def fits(self) -> bool:
        return self.prefill.fits and self.decode.fits and (not self.limit or self.total <= self.limit - self.reserved)

    @property
    def most_slots(self) -> int:
        """Slots that the chips' memory holds, if the programs took as much as with these."""
        free = self.limit - self.reserved - (self.total - self.slots_bytes)
        return max(0, free * self.slots // self.slots_bytes)


def plan_serving(
    config: Config, topology: Topology, batch_size: int, max_prompt_tokens: int, max_new_tokens: int
) -> ServePlan:
    """Compile the largest prefill and the decoding step that `jax-it serve` has for a model with these options."""
    config = with_dtype(config, topology)
    with jax.sharding.use_abstract_mesh(sharding.inference_mesh(0, topology.devices).abstract_mesh):
        model = find_model(config, topology)
    mesh = sharding.inference_mesh(model.parameter_count, topology.devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        dtypes = storage_dtypes(model, config.model)
        shapes = jax.eval_shape(lambda key: cast_or_quantize(model.init(key), dtypes), jax.random.key(0))
    params = abstract(shapes, sharding.shardings(model.logical_axes, shapes, mesh))
    engine = Engine(model, mesh, max_new_tokens, batch_size, eos_ids=[1])  # which token ends texts changes no shape
    lowered = engine.lower(params, max_prompt_tokens)
    rows, width = lowered.prompts
    return ServePlan(
        topology=topology.name, chip=topology.chip.name, devices=mesh.size,
        mesh={axis: int(size) for axis, size in mesh.shape.items() if size > 1},
        model=str(model.values.get("model_type")), parameters=model.parameter_count, slots=engine.num_slots,
        max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens,
        weights=_bytes(params) + _bytes(lowered.weights) - _shared_bytes(model.prepare_for_decoding, params),
        slots_bytes=_bytes(lowered.state),
        prefill=_program(lowered.prefill, rows * width, topology, mesh),
        decode=_program(lowered.decode, engine.num_slots, topology, mesh),
        limit=topology.chip.memory, reserved=RESERVED if topology.is_tpu else 0,
    )  # fmt: skip


def _bytes(shapes: Any) -> int:
    return bytes_of(shapes, jax.tree.map(lambda leaf: leaf.sharding, shapes))


def _shared_bytes(prepare: Callable[[Params], Any], params: Params) -> int:
    """Return the bytes of weights that are used for decoding as they are, so that there is one copy."""
    jaxpr = jax.make_jaxpr(prepare)(params).jaxpr
    same = {id(out) for out in jaxpr.outvars}
    leaves = jax.tree.leaves(params)
    return _bytes([leaf for leaf, variable in zip(leaves, jaxpr.invars, strict=True) if id(variable) in same])


def _program(lowered: jax.stages.Lowered, tokens: int, topology: Topology, mesh: jax.sharding.Mesh) -> Program:
    try:
        compiled = compile_lowered(lowered)
    except TooLarge as error:
        return Program(tokens, error.needed, 0, 0.0, False)
    # The loop over steps has no known trip count, and so counts once.
    _, regions = cost.of_program(read(compiled.text, mesh.size), topology, list(mesh.devices.flat))
    seconds = sum(region.seconds for region in regions)
    return Program(tokens, compiled.temporary_bytes, compiled.code_bytes, seconds, True)


def text(plan: ServePlan) -> str:
    """Return the report."""
    return "\n".join(_lines(plan))


def to_json(plan: ServePlan) -> dict[str, Any]:
    """Return the plan's fields and what follows from them; sizes in bytes, times in seconds."""
    rates = {"prefill_tokens_per_second": plan.prefill.rate, "decode_tokens_per_second": plan.decode.rate}
    return dataclasses.asdict(plan) | {"total": plan.total, "fits": plan.fits} | rates


def _lines(plan: ServePlan) -> Iterator[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "data=1"
    yield f"{plan.model}, {plan.parameters / 1e9:.2f}B parameters"
    yield f"{plan.topology}: {plan.devices} devices ({plan.chip}), {mesh}"
    yield (
        f"{plan.slots} slots, each for a prompt of {plan.max_prompt_tokens} tokens and a text of {plan.max_new_tokens}"
    )
    yield ""
    yield "memory per chip, GiB"
    temporary, code = max(plan.prefill.temporary, plan.decode.temporary), plan.prefill.code + plan.decode.code
    for name, size in (("weights", plan.weights), ("slots", plan.slots_bytes), ("other", temporary), ("code", code)):
        yield f"  {'program' if name == 'code' else name:<28}{size / 2**30:8.2f}"
    limit = f" of {plan.limit / 2**30:.2f}: {'it fits' if plan.fits else 'IT DOES NOT FIT'}" if plan.limit else ""
    yield f"  {'together':<28}{plan.total / 2**30:8.2f}{limit}"
    if plan.limit:
        yield f"  slots that the memory holds {plan.most_slots:8}"
    if plan.decode.seconds:
        yield ""
        yield "at published peak rates"
        yield f"  {'a decoding step':<28}{plan.decode.seconds * 1e3:8.2f} ms at least"
        yield f"  {'new tokens':<28}{plan.decode.rate:8.0f} per second at most, all slots busy"
        yield f"  {'tokens of prompts':<28}{plan.prefill.rate:8.0f} per second at most"
