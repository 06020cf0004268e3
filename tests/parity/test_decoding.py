"""Decoding token by token, for every family."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases
from tests.parity.test_stored import TOLERANCE

LENGTH = max(cases.TARGET_LENGTHS)
DELAYS = np.array([0, 2, 5])  # rows that start so many steps late: each row is at a position of its own


def test_cached_decoding_gives_the_logits_of_the_full_forward_pass_at_every_position(loaded, ours):
    model, given = loaded.model, loaded.given
    tokens_BT = jnp.asarray(cases.batch(given).tokens_BT)
    rows = jnp.arange(len(DELAYS))

    @jax.jit
    def decode(params):
        def step(cache, number):
            positions_B = jnp.clip(number - DELAYS, 0, LENGTH - 1)
            logits_BV, cache = model.step(params, tokens_BT[rows, positions_B], positions_B, cache)
            return cache, logits_BV

        cache = model.prefill(params, given.source_BS, given.source_mask_BS, LENGTH)
        return jax.lax.scan(step, cache, jnp.arange(LENGTH + max(DELAYS)))[1]

    logits_XBV = np.asarray(decode(loaded.params))
    for row, (delay, length) in enumerate(zip(DELAYS, cases.TARGET_LENGTHS, strict=True)):
        stepwise_TV = logits_XBV[delay : delay + length, row]
        np.testing.assert_allclose(stepwise_TV, ours.logits_BTV[row, :length], rtol=0, atol=TOLERANCE)
