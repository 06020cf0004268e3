"""How fast a run is, and what share of the hardware's arithmetic it uses."""

from collections.abc import Mapping
from typing import Any

import jax

from jax_it.chips import chip_of
from jax_it.data.loader import Sizes
from jax_it.data.packing import Shape
from jax_it.models import Model
from jax_it.training.phases import Phases

TRAINING = ("stepping", "waiting", "saving")  # the phases that rates are over


def peak_flops(devices: int) -> float | None:
    """Return the published peak FLOP/s of all devices; None for a kind that `chips` does not list, such as a CPU."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops * devices if chip else None


def step_flops(model: Model, rows: float, shape: Shape) -> float:
    """Return the FLOPs of a step: a backward pass costs two forward passes, or one if the weights are frozen."""
    return (2 if model.adapter else 3) * rows * model.config.flops(shape.source, shape.target, shape.blocks)


class Throughput:
    """Measure rates since the last `report`; `flops` are the model's, forward and backward, without recomputation.

    Time spent on anything but training, such as compiling or evaluating, is left out. `position` is that of the
    checkpoint from which the run continues: the first report then counts the steps before it too.
    """

    def __init__(self, peak: float | None, phases: Phases, position: Mapping[str, Any] | None = None):
        self._peak, self._phases = peak, phases
        self._shapes: set[Shape] = set()
        self._restart()
        if position:
            begin, waited = position["begin"]
            self._begin = begin, waited
            self._totals.update(position["totals"])
            self._steps, self._flops = position["steps"], position["flops"]

    def position(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the steps that are not reported yet."""
        return {"begin": list(self._begin), "steps": self._steps, "flops": self._flops, "totals": self._totals}

    def _restart(self) -> None:
        self._begin = self._spent()
        self._steps, self._flops = 0, 0.0
        self._totals: dict[str, int] = {}

    def _spent(self) -> tuple[float, float]:
        """Return the seconds of training so far, and how many of them were spent waiting for data."""
        seconds = self._phases.now()
        return sum(seconds[phase] for phase in TRAINING), seconds["waiting"]

    def knows(self, shape: Shape) -> bool:
        """Return whether a step of this shape was added before, and need not be compiled."""
        return shape in self._shapes

    def add(self, sizes: Sizes, shape: Shape, flops: float) -> None:
        self._shapes.add(shape)
        self._steps += 1
        self._flops += float(flops)
        for name in sizes._fields:
            self._totals[name] = self._totals.get(name, 0) + int(getattr(sizes, name))

    def report(self) -> dict[str, float]:
        """Return the rates: of tokens without padding; data_share is the share of time spent waiting for data."""
        seconds, waited = (now - then for now, then in zip(self._spent(), self._begin, strict=True))
        totals = self._totals
        rates = {
            "tokens": totals["source_tokens"] + totals["target_tokens"],
            "examples": totals["examples"],
            "tokens_per_second": (totals["source_tokens"] + totals["target_tokens"]) / seconds,
            "examples_per_second": totals["examples"] / seconds,
            "seconds_per_step": seconds / self._steps,
            "flops_per_second": self._flops / seconds,
            "data_share": waited / seconds,
            "target_fill": totals["target_tokens"] / totals["target_positions"],
        }
        if self._peak:
            rates["mfu"] = rates["flops_per_second"] / self._peak
        if totals["source_positions"]:
            rates["source_fill"] = totals["source_tokens"] / totals["source_positions"]
        self._restart()
        return rates
