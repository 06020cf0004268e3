"""How fast a run is, and what share of the hardware's arithmetic it uses."""

import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jax_it.data.loader import Sizes

# Published peaks of dense bfloat16 matmul, FLOP/s of one device, by jax's name for it.
PEAK = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def peak_flops(devices: int) -> float:
    """FLOP/s of all devices: the published peak, or what a large float32 matmul reaches on a CPU."""
    kind = jax.devices()[0].device_kind
    published = [peak for name, peak in PEAK.items() if kind.startswith(name)]
    # Fake CPU devices share the one processor, which the matmul measures.
    return published[-1] * devices if published else _measured_flops()


def _measured_flops(size: int = 1024, tries: int = 5) -> float:
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(tries):
        begin = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


@dataclass
class Throughput:
    """Rates since the last `report`; `flops` are the model's, forward and backward, without recomputation."""

    peak: float
    _begin: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0
    _steps: int = 0
    _flops: float = 0.0
    _totals: dict[str, int] = field(default_factory=dict)

    def add(self, sizes: Sizes, flops: float, waited: float) -> None:
        self._steps += 1
        self._flops += flops
        self._waited += waited
        for name in sizes._fields:
            self._totals[name] = self._totals.get(name, 0) + getattr(sizes, name)

    def report(self) -> dict[str, float]:
        """tokens_per_second counts tokens, never padding; data_share is the time that steps waited for data."""
        seconds = time.perf_counter() - self._begin
        totals = self._totals
        rates = {
            "tokens": totals["source_tokens"] + totals["target_tokens"],
            "examples": totals["examples"],
            "tokens_per_second": (totals["source_tokens"] + totals["target_tokens"]) / seconds,
            "examples_per_second": totals["examples"] / seconds,
            "seconds_per_step": seconds / self._steps,
            "mfu": self._flops / seconds / self.peak,
            "data_share": self._waited / seconds,
            "target_fill": totals["target_tokens"] / totals["target_positions"],
        }
        if totals["source_positions"]:
            rates["source_fill"] = totals["source_tokens"] / totals["source_positions"]
        self._begin, self._waited, self._steps, self._flops, self._totals = time.perf_counter(), 0.0, 0, 0.0, {}
        return rates

    def pause(self, seconds: float) -> None:
        """Leaves time that was no training (an evaluation, say) out of the rates."""
        self._begin += seconds
