"""Attention that reads each row of a cache as far as its text goes is attention to all of it, masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.models.attention import Scores
from jax_it.models.cache_attention import SHORTEST, attend_to_cache
from jax_it.models.kv_cache import Cached

ROWS, CAPACITY = 4, 4 * SHORTEST + 24


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("row_by_row", [True, False])
def test_it_equals_attention_in_float64_whatever_lies_beyond_a_rows_end(queries, row_by_row):
    rng = np.random.default_rng(0)
    end_B = np.array([1 + queries, SHORTEST, SHORTEST + 7, CAPACITY])
    query_BTNH = rng.normal(size=(ROWS, queries, 4, 8))
    key_LBKHS, value_LBKSH = (
        rng.normal(size=(2, ROWS + 2, 2, 8, CAPACITY)),
        rng.normal(size=(2, ROWS + 2, 2, CAPACITY, 8)),
    )
    bias_BNTS = rng.normal(size=(ROWS, 4, queries, CAPACITY))
    mask_BTS = np.arange(CAPACITY) <= (end_B[:, None] - queries + np.arange(queries))[:, :, None]
    mask_BTS &= rng.random(mask_BTS.shape) < 0.9
    mask_BTS[:, :, 0] = True
    arrays = [jnp.asarray(x, jnp.float32) for x in (query_BTNH, key_LBKHS, value_LBKSH, bias_BNTS)]
    cached = Cached(arrays[1], arrays[2], jnp.int32(1), jnp.asarray(mask_BTS), jnp.asarray(end_B))
    attend = jax.jit(lambda query, cached, bias: attend_to_cache(query, cached, Scores(0.3), bias, row_by_row))
    found_BTNH = attend(arrays[0], cached, arrays[3])

    key_BNHS, value_BNSH = (np.repeat(x[1, :ROWS], 2, axis=1) for x in (key_LBKHS, value_LBKSH))
    scores_BNTS = 0.3 * np.einsum("BTNH,BNHS->BNTS", query_BTNH, key_BNHS) + bias_BNTS
    powers_BNTS = np.where(mask_BTS[:, None], np.exp(scores_BNTS), 0)
    weights_BNTS = powers_BNTS / powers_BNTS.sum(-1, keepdims=True)
    expected_BTNH = np.einsum("BNTS,BNSH->BTNH", weights_BNTS, value_BNSH)
    np.testing.assert_allclose(found_BTNH, expected_BTNH, rtol=0, atol=5e-6)


def test_a_rows_result_is_bit_equal_alone_and_among_others():
    rng = np.random.default_rng(1)
    shapes = (ROWS, 1, 4, 8), (1, ROWS, 2, 8, CAPACITY), (1, ROWS, 2, CAPACITY, 8)
    query_BTNH, key_LBKHS, value_LBKSH = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    end_B = np.array([5, CAPACITY, SHORTEST + 1, 300])
    mask_BTS = jnp.asarray(np.arange(CAPACITY) < end_B[:, None, None])
    attend = jax.jit(lambda query, cached: attend_to_cache(query, cached, Scores(), None, True))
    together = attend(query_BTNH, Cached(key_LBKHS, value_LBKSH, 0, mask_BTS, jnp.asarray(end_B)))
    for rows in (1, 2):
        cached = Cached(key_LBKHS, value_LBKSH, 0, mask_BTS[:rows], jnp.asarray(end_B[:rows]))
        np.testing.assert_array_equal(attend(query_BTNH[:rows], cached), together[:rows])
