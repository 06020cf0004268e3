"""Plans of servers, for fake CPU devices."""

import pytest

from jax_it.plan import find, serve
from tests.plan.test_plan import LLAMA, T5, make_config


@pytest.mark.parametrize("architecture", [T5, LLAMA])
def test_a_plan_counts_the_slots_and_the_weights_of_each_chip(architecture):
    small, large = (serve.plan_serving(make_config(architecture), find("cpu:2"), n, 64, 16) for n in (4, 8))
    assert (small.slots, large.slots) == (4, 8)
    assert 1.8 < large.slots_bytes / small.slots_bytes < 2.1
    parameters = 4 * small.parameters
    assert parameters <= small.weights <= 2 * parameters  # the weights whole on each chip, once or twice
    assert small.fits and small.total > small.weights + small.slots_bytes
    assert small.decode.tokens == 4
    assert "4 slots, each for a prompt of 64 tokens and a text of 16" in serve.text(small)
