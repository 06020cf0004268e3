"""Useful tokens per second of training: packed rows against batches padded to their longest, same code, same data.

    python bench/packing.py --config configs/t0_t5_small.py:random --steps 5 [--config.x.y=v …]

Steps of the two alternate in one process, so that a machine whose speed drifts slows both. A step with a
new shape runs once before it is timed.
"""

import argparse
import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jax_it import pretrained, sharding
from jax_it.cli import overrides
from jax_it.config import Config, load, to_dict
from jax_it.config import resolve as resolve_config
from jax_it.run import start_run
from jax_it.training.optimizer import make_optimizer, make_schedule
from jax_it.training.state import start, state_shardings
from jax_it.training.step import make_train_step


class Side:
    """Packed or padded: its data, and its own step and state."""

    def __init__(self, name: str, config: Config, model: Any, params: Any, mesh: Any):
        self.name = name
        run = start_run(config, mesh)
        assert run.data
        self._data = run.data.train
        schedule = make_schedule(config.train.optimizer, 1000, 0, 0)
        optimizer = make_optimizer(config.train.optimizer, schedule, model.trained_logical_axes)
        state = start(*model.split(jax.tree.map(jnp.copy, params)), optimizer)  # a copy, as the step donates its state
        shardings = state_shardings(model, state, mesh)
        self._state = jax.device_put(state, shardings)
        self._step = make_train_step(model, config.train, optimizer, schedule, mesh, shardings)
        self._shapes: set[tuple[int, ...]] = set()
        self.rates: list[float] = []
        self.seconds, self.loading = 0.0, 0.0
        self.sizes: list[Any] = []
        print(f"{name}: {self._data.layout}")

    def take(self, number: int) -> None:
        begin = time.perf_counter()
        drawn = self._data.batch(number)
        self.loading += time.perf_counter() - begin
        if drawn.shape not in self._shapes:
            self._shapes.add(drawn.shape)
            self._run(drawn.batch)
        seconds = self._run(drawn.batch)
        self.seconds += seconds
        self.sizes.append(drawn.sizes)
        self.rates.append(drawn.sizes.tokens / seconds)

    def _run(self, batch: Any) -> float:
        begin = time.perf_counter()
        self._state, metrics = self._step(self._state, batch)
        metrics["loss"].block_until_ready()
        return time.perf_counter() - begin

    def report(self) -> float:
        """Print the rates and fills; return useful tokens per second."""
        total = {name: sum(getattr(size, name) for size in self.sizes) for name in self.sizes[0]._fields}
        useful = total["source_tokens"] + total["target_tokens"]
        fills = [
            f"{kind} {total[f'{kind}_tokens'] / total[f'{kind}_positions']:.1%} full"
            for kind in ("source", "target")
            if total[f"{kind}_positions"]
        ]
        print(
            f"{self.name}: {useful / self.seconds:.0f} useful tokens/s (median of steps {median(self.rates):.0f}), "
            f"{total['examples'] / self.seconds:.2f} examples/s, {self.seconds / len(self.sizes):.2f} s a step, "
            f"{' and '.join(fills)}, "
            f"making batches takes {self.loading / self.seconds:.2%} of the step"
        )
        return useful / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=5)
    options, rest = parser.parse_known_args()
    config = load(options.config, overrides(rest, takes_config=True))
    tree = to_dict(config)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, params = pretrained.load(config.model, mesh, config.train.seed)
        sides = []
        for name, packing in (("packed", True), ("padded", False)):
            chosen = resolve_config({**tree, "data": {**tree["data"], "packing": packing}})
            sides.append(Side(name, chosen, model, params, mesh))
        for number in range(options.steps):
            for side in sides:
                side.take(number)
    packed, padded = (side.report() for side in sides)
    print(f"packed over padded: {packed / padded:.2f}")


if __name__ == "__main__":
    main()
