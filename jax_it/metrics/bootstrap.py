"""Percentile bootstrap over examples (Efron 1979): how far a score depends on which examples there are.

It says nothing of what another seed of the training would change.
"""

from collections.abc import Mapping

import numpy as np

from jax_it.metrics.metric import Array, Values

LEVEL = 0.95
_DRAWN_AT_ONCE = 2**22  # examples, of as many resamples as have no more together: about 100 MB


def intervals(
    metrics: Mapping[str, tuple[Values, Array]], resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return (low, high) of each metric, which is given as its function of sums and its numbers [examples, numbers].

    Each resample has as many examples. All metrics see the same ones, whichever others there are.
    """
    if not metrics:
        return {}
    examples = len(next(iter(metrics.values()))[1])
    generator = np.random.default_rng(seed)
    found: dict[str, list[Array]] = {name: [] for name in metrics}
    at_once = max(1, _DRAWN_AT_ONCE // examples)
    for start in range(0, resamples, at_once):
        counts = draw(generator, min(at_once, resamples - start), examples)
        for name, (values, rows) in metrics.items():
            found[name].append(values(counts @ rows, examples))
    tail = (1 - LEVEL) / 2
    quantiles = {name: np.quantile(np.concatenate(parts), (tail, 1 - tail)) for name, parts in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}


def draw(generator: np.random.Generator, resamples: int, examples: int) -> Array:
    """Return how often each resample holds each example [resamples, examples]."""
    indices = generator.integers(examples, size=(resamples, examples))
    indices += np.arange(resamples)[:, None] * examples
    return np.bincount(indices.ravel(), minlength=indices.size).reshape(indices.shape).astype(float)
