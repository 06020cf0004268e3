"""A plan as one page of text, or as JSON."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from jax_it.plan.cost import Traffic
from jax_it.plan.plan import Plan

GOAL = 0.6  # of the peak: below this utilization a plan names the bottlenecks


def text(plan: Plan) -> str:
    """Return the whole report."""
    return "\n".join(_lines(plan))


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's fields and what follows from them; sizes in bytes, times in seconds."""
    return dataclasses.asdict(dataclasses.replace(plan, traffic=by_kind(plan.traffic))) | {
        "fits": plan.fits,
        "time": times(plan),
        "obstacles": list(obstacles(plan)),
    }


def by_kind(traffic: list[Traffic]) -> list[Traffic]:
    """Sum up collectives of one kind, network, element type, group size and way of running."""
    sums: dict[Traffic, Traffic] = {}
    for each in traffic:
        key = dataclasses.replace(each, runs=0, bytes=0, seconds=0.0, ops=0)
        found = sums.get(key, key)
        totals = {name: getattr(found, name) + getattr(each, name) for name in ("runs", "bytes", "seconds", "ops")}
        sums[key] = dataclasses.replace(key, **totals)
    return sorted(sums.values(), key=lambda each: (each.network, -each.bytes))


def times(plan: Plan) -> dict[str, float]:
    """Return seconds of a step by what they go to, as if nothing ran beside anything else."""
    return {
        "arithmetic": sum(region.compute for region in plan.regions),
        "memory": sum(region.memory for region in plan.regions),
        "collectives beside compute": sum(region.overlapped for region in plan.regions),
        "collectives that wait": sum(region.blocking for region in plan.regions),
    }


def obstacles(plan: Plan) -> Iterator[str]:
    """Yield what keeps the utilization below the peak and its share of a step's time, the largest first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    if plan.hardware_flops:
        seconds["arithmetic that the model's FLOPs do not count, such as layers that are computed again (remat)"] = (
            times(plan)["arithmetic"] * (1 - plan.model_flops / plan.hardware_flops)
        )
    for each in plan.traffic:
        if not each.overlapped:
            seconds[f"{each.kind} of {each.dtype} over {each.network} that the chip waits for"] += each.seconds
    for region in plan.regions:
        compute, memory, network = region.compute, region.memory, region.overlapped
        seconds["memory traffic beyond the time of the arithmetic"] += max(memory - max(compute, network), 0)
        seconds["collectives that outlast the arithmetic beside them"] += max(network - max(compute, memory), 0)
    for name, lost in sorted(seconds.items(), key=lambda pair: -pair[1]):
        if lost > 0.01 * plan.seconds:
            yield f"{lost / plan.seconds:4.0%}  {name}"


def _lines(plan: Plan) -> Iterator[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "data=1"
    slices = f"{plan.slices} slices, " if plan.slices > 1 else ""
    trained = f", {plan.trained / 1e6:.1f}M of them trained" if plan.trained != plan.parameters else ""
    yield f"{plan.model}, {plan.parameters / 1e9:.2f}B parameters{trained}"
    yield f"{plan.topology}: {slices}{plan.devices} devices ({plan.chip}), {mesh}"
    yield f"a step: {plan.rows} rows of {plan.row}, {plan.tokens} positions"
    yield ""
    memory = plan.memory
    yield "memory per chip, GiB"
    labels = {"frozen": "frozen parameters", "activations": "activations kept", "code": "program"}
    for name, size in dataclasses.asdict(memory).items():
        if size and name not in ("total", "limit", "reserved"):
            yield f"  {labels.get(name, name):<28}{size / 2**30:8.2f}"
    limit = f" of {memory.limit / 2**30:.2f}: {'it fits' if memory.fits else 'IT DOES NOT FIT'}" if memory.limit else ""
    yield f"  {'together':<28}{memory.total / 2**30:8.2f}{limit}"
    for tried in plan.tries:
        settings = " ".join(f"--config.{name}={value}" for name, value in tried.settings.items())
        yield f"  with {settings}: {tried.total / 2**30:.2f}, {'fits' if tried.fits else 'does not fit'}"
    if not plan.fits and not any(tried.fits for tried in plan.tries):
        yield "  no settings were found that fit; take more chips, or train adapters (model.lora.rank)"
    if not plan.hardware_flops:
        return
    yield ""
    yield f"arithmetic of a step        {plan.model_flops:.3e} FLOPs of the model"
    ratio = plan.hardware_flops / plan.model_flops
    yield f"                            {plan.hardware_flops:.3e} of the hardware, {ratio:.2f} times as many"
    yield f"memory traffic per chip     {_bytes(plan.memory_bytes)} in a step"
    yield ""
    yield from _traffic_lines(plan.traffic)
    yield ""
    if plan.seconds:
        yield f"a step takes at least       {plan.seconds:.3f} s, at published peak rates"
        yield from (f"  {name:<28}{seconds:8.3f} s" for name, seconds in times(plan).items())
        yield f"utilization at most         {plan.utilization:.0%} of the peak, for the model's FLOPs"
        if plan.utilization < GOAL:
            yield "bottlenecks"
            yield from (f"  {line}" for line in obstacles(plan))
        yield ""
    if plan.unknown_trip_counts:
        yield f"counted once, since their trip counts are unknown: the loops {', '.join(plan.unknown_trip_counts)}"
    yield f"compiled in {plan.compile_seconds:.0f} s"


def _traffic_lines(traffic: list[Traffic]) -> Iterator[str]:
    if not traffic:
        yield "no collectives"
        return
    yield "collectives of a step, per chip"
    yield f"  {'network':<8}{'kind':<20}{'type':<6}{'among':>6}{'ops':>5}{'runs':>7}{'sent':>11}{'time':>10}"
    for each in by_kind(traffic):
        time = f"{each.seconds * 1e3:7.1f} ms" if each.seconds else ""
        note = "beside compute" if each.overlapped else "async, nothing beside it" if each.asynchronous else "waits"
        yield (
            f"  {each.network:<8}{each.kind:<20}{each.dtype:<6}{each.devices:>6}{each.ops:>5}{each.runs:>7}"
            f"{_bytes(each.bytes):>11}{time:>10}  {note}{'; only part of the result is used' if each.wasteful else ''}"
        )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.3g} TB"
