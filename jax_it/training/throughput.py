"""How fast a run is, and what share of the hardware's arithmetic it uses."""

import time
from functools import cache

import jax
import jax.numpy as jnp

from jax_it.chips import chip_of
from jax_it.data.loader import Sizes
from jax_it.data.packing import Shape
from jax_it.models import Model
from jax_it.training.phases import Phases

TRAINING = ("compiling", "stepping", "waiting", "saving")  # the phases that rates are over


def peak_flops(devices: int) -> float:
    """FLOP/s of all devices: the published peak, or what a large float32 matmul reaches on a CPU."""
    chip = chip_of(jax.devices()[0].device_kind)
    # Fake CPU devices share the one processor, which the matmul measures.
    return chip.flops * devices if chip else _measured_flops()


def step_flops(model: Model, rows: float, shape: Shape) -> float:
    """FLOPs of the forward pass, and twice that of the backward; as many again where weights are frozen."""
    return (2 if model.adapter else 3) * rows * model.config.flops(shape.source, shape.target, shape.blocks)


@cache
def _measured_flops(size: int = 1024, seconds: float = 0.2) -> float:
    """The best of many tries: the processor may have other work."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


class Throughput:
    """Rates since the last `report`; `flops` are the model's, forward and backward, without recomputation.

    Time that is no training, as that of an evaluation, is left out.
    """

    def __init__(self, peak: float, phases: Phases):
        self._peak, self._phases = peak, phases
        self._shapes: set[Shape] = set()
        self._restart()

    def _restart(self) -> None:
        self._begin = self._spent()
        self._steps, self._flops = 0, 0.0
        self._totals: dict[str, int] = {}

    def _spent(self) -> tuple[float, float]:
        """Seconds of training so far, and of waiting for data among them."""
        seconds = self._phases.now()
        return sum(seconds[phase] for phase in TRAINING), seconds["waiting"]

    def knows(self, shape: Shape) -> bool:
        """Whether a step of this shape was added before, and need not be compiled."""
        return shape in self._shapes

    def add(self, sizes: Sizes, shape: Shape, flops: float) -> None:
        self._shapes.add(shape)
        self._steps += 1
        self._flops += flops
        for name in sizes._fields:
            self._totals[name] = self._totals.get(name, 0) + getattr(sizes, name)

    def report(self) -> dict[str, float]:
        """tokens_per_second counts tokens, never padding; data_share is the time that steps waited for data."""
        seconds, waited = (now - then for now, then in zip(self._spent(), self._begin, strict=True))
        totals = self._totals
        rates = {
            "tokens": totals["source_tokens"] + totals["target_tokens"],
            "examples": totals["examples"],
            "tokens_per_second": (totals["source_tokens"] + totals["target_tokens"]) / seconds,
            "examples_per_second": totals["examples"] / seconds,
            "seconds_per_step": seconds / self._steps,
            "mfu": self._flops / seconds / self._peak,
            "data_share": waited / seconds,
            "target_fill": totals["target_tokens"] / totals["target_positions"],
        }
        if totals["source_positions"]:
            rates["source_fill"] = totals["source_tokens"] / totals["source_positions"]
        self._restart()
        return rates
