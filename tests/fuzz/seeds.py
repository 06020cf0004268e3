"""Seeds of fuzzing cases, in chunks that pytest spreads over its workers."""

import os
from typing import Any

import pytest

SEED = int(os.environ.get("FUZZ_SEED", "0"))


def fuzz_cases(number: int, short: int, chunk: int = 50, marks: tuple[Any, ...] = ()) -> pytest.MarkDecorator:
    """Parametrizes a test by `seeds`: the first `short` (0: none) among the default tests, all `number` in `make fuzz`.

    A case is drawn by `random.Random(seed)`, or numpy's generator, with one of the seeds and nothing else. `marks` go
    on the short part, as `pytest.mark.parity` where PyTorch is needed.
    """
    seeds = [SEED * 1_000_000 + i for i in range(number)]
    parts = [seeds[i : i + chunk] for i in range(0, number, chunk)]
    params = [pytest.param(seeds[:short], id="short", marks=marks)] if short else []
    params += [pytest.param(part, id=f"{part[0]}-{part[-1]}", marks=pytest.mark.fuzz) for part in parts]
    return pytest.mark.parametrize("seeds", params)
