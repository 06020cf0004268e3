"""Prompts are padded to few widths, and these waste the least."""

import itertools

import numpy as np
import pytest

from jax_it.generation import length_buckets

ROWS = 8


def cost(lengths, chosen, compiled, compile):
    return ROWS * sum(chosen) + compile * len(set(chosen) - set(compiled))


def cheapest(lengths, compiled, compile):
    """By trying every set of widths."""
    places = sorted({length_buckets.round_up(length) for length in lengths} | set(compiled))
    costs = []
    for number in range(1, len(places) + 1):
        for some in itertools.combinations(places, number):
            if some[-1] >= max(lengths):
                costs.append(cost(lengths, [min(w for w in some if w >= n) for n in lengths], compiled, compile))
    return min(costs)


@pytest.mark.parametrize("compile", [0, 500, 4096, 10**6])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_widths_cost_less(seed, compile, monkeypatch):
    monkeypatch.setattr(length_buckets, "COMPILE_COST", compile)
    rng = np.random.default_rng(seed)
    lengths = sorted(rng.integers(1, 300, 12).tolist())
    compiled = [] if seed % 2 else [length_buckets.round_up(n) for n in rng.integers(1, 600, 3).tolist()]
    chosen = length_buckets.choose(lengths, ROWS, compiled)
    assert len(chosen) == len(lengths) and chosen == sorted(chosen)
    assert all(length <= width for length, width in zip(lengths, chosen, strict=True))
    assert cost(lengths, chosen, compiled, compile) == cheapest(lengths, compiled, compile)


def test_a_width_holds_its_length_and_is_less_than_a_quarter_longer_where_that_is_long():
    for length in range(1, 5000):
        width = length_buckets.round_up(length)
        assert length <= width < length + max(16, length / 4)
    assert len({length_buckets.round_up(length) for length in range(1, 8193)}) == 32


def test_what_is_compiled_already_is_used_again():
    first = length_buckets.choose([20, 40, 300], ROWS)
    assert length_buckets.choose([22, 41, 290], ROWS, compiled=first) == first


def test_no_prompts_have_no_widths():
    assert length_buckets.choose([], ROWS) == []
