"""A plan as one page of text, or as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax_it.plan.cost import Traffic
from jax_it.plan.plan import Memory, Plan

GOAL = 0.6  # utilisation below which a plan says what stands in the way


def text(plan: Plan) -> str:
    """The whole report."""
    return "\n".join(_lines(plan))


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan's fields and what follows from them; sizes in bytes, times in seconds."""
    return dataclasses.asdict(plan) | {
        "fits": plan.fits,
        "time": {name: seconds for name, seconds in times(plan).items()},
        "obstacles": list(obstacles(plan)),
    }


def _lines(plan: Plan) -> Iterator[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "data=1"
    slices = f"{plan.slices} slices, " if plan.slices > 1 else ""
    trained = f", {plan.trained / 1e6:.1f}M of them trained" if plan.trained != plan.parameters else ""
    yield f"{plan.model}, {plan.parameters / 1e9:.2f}B parameters{trained}"
    yield f"{plan.topology}: {slices}{plan.devices} devices ({plan.chip}), {mesh}"
    yield f"a step: {plan.rows} rows of {plan.row}, {plan.tokens} positions"
    yield ""
    yield from _memory_lines(plan)
    if not plan.hardware_flops:
        return
    yield ""
    yield f"arithmetic of a step        {plan.model_flops:.3e} FLOPs of the model"
    again = plan.hardware_flops / plan.model_flops
    yield f"                            {plan.hardware_flops:.3e} of the hardware, {again:.2f} times as many"
    yield f"memory traffic of a chip    {_bytes(plan.memory_bytes)} a step"
    yield ""
    yield from _traffic_lines(plan.traffic)
    if plan.seconds:
        yield ""
        yield from _time_lines(plan)
    yield ""
    if plan.endless:
        yield f"counted once, since their number of turns is not known: the loops {', '.join(plan.endless)}"
    yield f"compiled in {plan.compile_seconds:.0f} s"


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield "memory of a chip, GiB"
    for name, size in parts(memory).items():
        if size:
            yield f"  {name:<28}{size / 2**30:8.2f}"
    limit = f" of {memory.limit / 2**30:.2f}" if memory.limit else ""
    verdict = "" if not memory.limit else ": it fits" if memory.fits else ": IT DOES NOT FIT"
    yield f"  {'together':<28}{memory.total / 2**30:8.2f}{limit}{verdict}"
    for tried in plan.tries:
        settings = " ".join(f"--config.{name}={value}" for name, value in tried.settings.items())
        yield f"  with {settings}: {tried.total / 2**30:.2f}, {'fits' if tried.fits else 'does not fit'}"
    if not memory.fits and not any(tried.fits for tried in plan.tries):
        yield "  no settings were found that fit; take more chips, or train adapters (model.lora.rank)"


def parts(memory: Memory) -> dict[str, int]:
    """What a chip's memory holds, by name."""
    return {
        "parameters": memory.parameters,
        "frozen parameters": memory.frozen,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "activations kept": memory.activations,
        "gradients": memory.gradients,
        "other": memory.other,
        "program": memory.code,
    }


def by_kind(traffic: list[Traffic]) -> list[tuple[Traffic, int]]:
    """Collectives of one kind, network, element type and way of running, summed up, and how many there are of them."""
    sums: dict[tuple[Any, ...], tuple[Traffic, int]] = {}
    for each in traffic:
        key = (each.network, each.kind, each.dtype, each.devices, each.overlapped, each.asynchronous, each.wasteful)
        before = sums.get(key)
        if before:
            sums[key] = (
                dataclasses.replace(
                    before[0],
                    runs=before[0].runs + each.runs,
                    bytes=before[0].bytes + each.bytes,
                    seconds=before[0].seconds + each.seconds,
                ),
                before[1] + 1,
            )
        else:
            sums[key] = (each, 1)
    return sorted(sums.values(), key=lambda pair: (pair[0].network, -pair[0].bytes))


def _traffic_lines(traffic: list[Traffic]) -> Iterator[str]:
    if not traffic:
        yield "no collectives"
        return
    yield "collectives of a step, of one chip"
    yield f"  {'network':<8}{'kind':<20}{'type':<6}{'among':>6}{'ops':>5}{'runs':>7}{'sent':>11}{'time':>10}"
    for each, ops in by_kind(traffic):
        time = f"{each.seconds * 1e3:7.1f} ms" if each.seconds else ""
        note = "beside compute" if each.overlapped else "waits" if not each.asynchronous else "async, nothing beside it"
        waste = "; of the result a part is used" if each.wasteful else ""
        yield (
            f"  {each.network:<8}{each.kind:<20}{each.dtype:<6}{each.devices:>6}{ops:>5}{each.runs:>7}"
            f"{_bytes(each.bytes):>11}{time:>10}  {note}{waste}"
        )


def times(plan: Plan) -> dict[str, float]:
    """Seconds of a step by what they go to, as if nothing ran beside anything else."""
    return {
        "arithmetic": sum(region.compute for region in plan.regions),
        "memory": sum(region.memory for region in plan.regions),
        "collectives beside compute": sum(region.overlapped for region in plan.regions),
        "collectives that wait": sum(region.blocking for region in plan.regions),
    }


def _time_lines(plan: Plan) -> Iterator[str]:
    yield f"a step takes at least       {plan.seconds:.3f} s, at published peak rates"
    for name, seconds in times(plan).items():
        yield f"  {name:<28}{seconds:8.3f} s"
    yield f"utilisation at most         {plan.utilisation:.0%} of the peak, for the model's FLOPs"
    if plan.utilisation < GOAL:
        yield "what stands in the way"
        yield from (f"  {line}" for line in obstacles(plan))


def obstacles(plan: Plan) -> Iterator[str]:
    """What keeps the utilisation below the peak, the largest first."""
    if not plan.seconds:
        return
    found: list[tuple[float, str]] = []
    arithmetic = times(plan)["arithmetic"]
    again = arithmetic * (1 - plan.model_flops / plan.hardware_flops) if plan.hardware_flops else 0.0
    found.append((again, "arithmetic that the model's FLOPs do not count, as layers that are computed again (remat)"))
    waiting: dict[tuple[Any, ...], float] = {}
    for each in plan.traffic:
        if not each.overlapped:
            key = (each.kind, each.network, each.dtype)
            waiting[key] = waiting.get(key, 0.0) + each.seconds
    for (kind, network, dtype), seconds in waiting.items():
        found.append((seconds, f"{kind} of {dtype} over {network} that the chip waits for"))
    by_memory = sum(max(r.memory - max(r.compute, r.overlapped), 0) for r in plan.regions)
    by_network = sum(max(r.overlapped - max(r.compute, r.memory), 0) for r in plan.regions)
    most = max(plan.regions, key=lambda r: r.memory - max(r.compute, r.overlapped))
    where = f", most in the loop of {_short(most.heaviest)}" if most.heaviest else ""
    found.append((by_memory, f"memory traffic beyond the time of the arithmetic{where}"))
    found.append((by_network, "collectives that outlast the arithmetic beside them"))
    for seconds, name in sorted(found, reverse=True):
        if seconds > 0.01 * plan.seconds:
            yield f"{seconds / plan.seconds:4.0%}  {name}"


def _short(source: str) -> str:
    """The last two parts of JAX's name of an operation."""
    return "/".join(source.split("/")[-2:])


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.3g} TB"
