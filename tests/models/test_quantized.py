"""Quantized weights are the nearest levels, in few bytes, however a weight is cut, and from numpy as from JAX."""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from jax_it.models import quantized
from jax_it.models.quantized import KINDS, NF4_LEVELS, Quantized, block_size, quantize

FROM = {"numpy": np.asarray, "jax": jnp.asarray}
BITS = {"nf4": 4, "int8": 8}


def weight(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same(a, b):
    return a.kind == b.kind and all(
        np.array_equal(np.asarray(x), np.asarray(y)) and x.dtype == y.dtype
        for x, y in [(a.codes, b.codes), (a.scales, b.scales)]
    )


def unpack(q):
    """Its codes one by one, [..., n]."""
    codes = np.asarray(q.codes)
    return codes if q.kind == "int8" else np.stack([codes % 16, codes // 16], -1).reshape(q.shape)


def levels(kind):
    return NF4_LEVELS.astype(np.float64) if kind == "nf4" else np.arange(-127, 128, dtype=np.float64)


def scale_of_each(q):
    return np.repeat(np.asarray(q.scales, np.float64), q.shape[-1] // q.scales.shape[-1], -1)


def test_nf4_levels_are_the_quantiles_of_appendix_e():
    # Its values, made in float32 from an outermost probability of 0.9677083: off by 3e-8, thus by 3e-7 here.
    printed = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
        -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
        0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
    np.testing.assert_allclose(NF4_LEVELS, np.array(printed.split(), float), atol=5e-7, rtol=0)

    outermost = (29 / 30 + 31 / 32) / 2
    above, below = norm.ppf(np.linspace(0.5, outermost, 9)), norm.isf(np.linspace(0.5, outermost, 8))
    expected = np.concatenate([below[:0:-1], above]) / above[-1]
    # Two float64 quantile functions, then one rounding to float32.
    np.testing.assert_allclose(NF4_LEVELS, expected, atol=2**-25 + 1e-12, rtol=0)
    assert NF4_LEVELS.dtype == np.float32 and (np.diff(NF4_LEVELS) > 0).all()


@pytest.mark.parametrize("n, block", [(64, 64), (576, 64), (96, 32), (80, 16), (24, 8), (8, 8), (65536, 64)])
def test_a_block_is_the_largest_power_of_two_up_to_64_that_divides_the_axis(n, block):
    assert block_size(n) == block
    q = quantize(weight(3, n), "nf4")
    assert q.codes.shape == (3, n // 2) and q.scales.shape == (3, n // block) and q.shape == (3, n)


@pytest.mark.parametrize("shape", [(4, 63), (4, 4), (4, 12), (4, 1), ()])
def test_an_axis_with_no_block_of_8_is_refused(shape):
    assert not shape or block_size(shape[-1]) == 0
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        quantize(np.ones(shape, np.float32), "nf4")


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'int4'.*nf4, int8"):
        quantize(weight(1, 64), "int4")


@pytest.mark.parametrize("kind, most", [("nf4", 0.6), ("int8", 1.1)])
def test_bytes_per_parameter_are_few(kind, most):
    for make in FROM.values():
        q = quantize(make(weight(4, 16, 128)), kind)
        assert q.nbytes == 4 * 16 * 128 * BITS[kind] // 8 + 4 * 16 * 2 * 2
        assert q.nbytes / q.size <= most


@pytest.mark.parametrize("make", FROM.values(), ids=FROM)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_numpy_gives_numpy_and_jax_gives_jax_with_the_same_numbers(make, kind, dtype):
    array = weight(5, 96).astype(dtype)
    q = quantize(make(array), kind)
    kinds = {np.ndarray} if make is np.asarray else {type(jnp.zeros(1))}
    assert {type(q.codes), type(q.scales)} == kinds
    assert (q.codes.dtype, q.scales.dtype) == (np.uint8 if kind == "nf4" else np.int8, ml_dtypes.bfloat16)
    # Multiplied in float32 from the same bfloat16 or float16 values: no rounding differs.
    assert same(q, quantize(array.astype(np.float32), kind))
    assert same(q, jax.jit(partial(quantize, kind=kind))(jnp.asarray(array)))


@pytest.mark.parametrize("make", FROM.values(), ids=FROM)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [1e-30, 0.02, 1e30])
def test_each_value_gets_the_nearest_level_by_brute_force(make, kind, spread):
    array = (weight(6, 128) * spread).astype(np.float32)
    q = quantize(make(array), kind)
    choices = levels(kind) * scale_of_each(q)[..., None]
    errors = np.abs(choices - array[..., None].astype(np.float64))
    chosen = unpack(q).astype(int) + (127 if kind == "int8" else 0)
    got = np.take_along_axis(errors, chosen[..., None], -1)[..., 0]
    # Borders and quotients are rounded to float32, at most thrice: near a tie the other neighbour may be taken.
    slack = 3 * 2.0**-24 * np.abs(array)
    assert (got <= errors.min(-1) + slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_rounded_to_bfloat16_before_codes_are_chosen(kind):
    steps = levels(kind)[-1]  # what the scale is multiplied by for the largest magnitude
    kept = 1 + 2**-7
    low, high = levels(kind)[-3:-1]
    border = (low + high) / 2
    for near, expected in [(border * (1 - 1e-4), low), (border * (1 + 1e-4), high)]:
        # Without rounding the scale is 1 + 2**-8 + 2**-12, and `near` times 1 + 2**-7 is above the border both times.
        array = np.full((1, 64), near * kept, np.float32)
        array[0, 0] = steps * (1 + 2**-8 + 2**-12)
        for q in (quantize(array, kind), quantize(jnp.asarray(array), kind)):
            assert float(q.scales[0, 0]) == kept
            codes = unpack(q)[0, 1:].astype(int) + (127 if kind == "int8" else 0)
            assert (levels(kind)[codes] == expected).all()


@pytest.mark.parametrize("make", FROM.values(), ids=FROM)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_lie_on_levels_come_back_exactly(make, kind):
    scales = np.array([[1.0], [2**-5], [0.15625], [3e-20]], ml_dtypes.bfloat16).astype(np.float32)
    chosen = np.random.default_rng(1).permutation(levels(kind))[:64].astype(np.float32)
    array = np.resize(chosen, (4, 64))
    array[:, 0] = -levels(kind)[-1]  # the block's largest
    array = array * scales
    restored = quantize(make(array), kind).dequantize(jnp.float32)
    np.testing.assert_array_equal(restored, array)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8),
)
def test_an_error_is_at_most_half_the_widest_gap_times_the_scale(kind, values):
    array = np.array([values], np.float32)
    q = quantize(array, kind)
    widest = np.diff(levels(kind)).max()
    errors = np.abs(np.asarray(q.dequantize(jnp.float32), np.float64) - array)
    # The product of level and scale is rounded to float32; a scale of 0 represents a value below its smallest.
    largest_step = 1 if kind == "nf4" else 127
    bound = widest / 2 * scale_of_each(q) + 2.0**-23 * np.abs(array) + largest_step * np.finfo(np.float32).tiny
    assert (errors <= bound).all()


def test_two_codes_share_a_byte_the_first_in_the_lower_half():
    array = np.zeros((1, 8), np.float32)
    array[0] = [NF4_LEVELS[i] for i in (0, 15, 7, 8, 1, 2, 15, 0)]
    np.testing.assert_array_equal(quantize(array, "nf4").codes, [[0xF0, 0x87, 0x21, 0x0F]])
    q = Quantized(np.array([[0xF0, 0x87, 0x21, 0x0F]], np.uint8), np.ones((1, 1), ml_dtypes.bfloat16), "nf4")
    np.testing.assert_array_equal(q.dequantize(jnp.float32), array)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_quantized_part_by_part_is_the_whole_one(kind):
    array = weight(4, 6, 256)
    whole = quantize(array, kind)
    per_byte = 2 if kind == "nf4" else 1
    for first, second, last in itertools.product([slice(0, 1), slice(1, 4)], [slice(2), slice(2, 6)], [0, 64, 192]):
        part = quantize(array[first, second, last:], kind)
        cut = Quantized(whole.codes[first, second, last // per_byte :], whole.scales[first, second, last // 64 :], kind)
        assert same(part, cut)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_larger_than_what_numpy_takes_at_a_time_is_no_different(kind, monkeypatch):
    array = weight(7, 192)
    whole = quantize(array, kind)
    monkeypatch.setattr(quantized, "_CHUNK", 128)
    assert same(quantize(array, kind), whole)
    assert same(quantize(np.asfortranarray(array), kind), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_sliced_by_scan_and_vmap(kind):
    array = weight(3, 8, 64)
    q = quantize(jnp.asarray(array), kind)
    whole = q.dequantize(jnp.float32)
    assert whole.shape == q.shape == array.shape

    def layer(x, part):
        assert part.shape == (8, 64) and part.ndim == 2
        return x, part.dequantize(jnp.float32)

    np.testing.assert_array_equal(jax.jit(lambda q: jax.lax.scan(layer, 0.0, q)[1])(q), whole)
    np.testing.assert_array_equal(jax.vmap(lambda part: part.dequantize(jnp.float32))(q), whole)
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize(jnp.float32))(q), whole)
    shapes = jax.eval_shape(partial(quantize, kind=kind), jax.ShapeDtypeStruct((3, 8, 64), jnp.float32))
    assert shapes.shape == (3, 8, 64) and jax.tree.structure(shapes) == jax.tree.structure(q)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_scan_of_checkpointed_layers_keeps_no_dequantized_weight(kind):
    layers, width = 8, 512
    q = quantize(jnp.zeros((layers, width, width)), kind)

    @jax.checkpoint
    def layer(x, weights):
        frozen, bias = weights
        return jnp.tanh(x @ frozen.dequantize(x.dtype) + bias), None

    def loss(bias, q):
        return jax.lax.scan(layer, jnp.ones((2, width)), (q, bias))[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((layers, width)), q).compile()
    one_layer = 4 * width * width
    # One of them is dequantized at a time, forwards or backwards.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * one_layer


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_rounded_once_to_the_dtype_asked_for(kind):
    q = quantize(weight(4, 64), kind)
    whole = np.asarray(q.dequantize(jnp.float32))
    half = jax.jit(lambda q: q.dequantize(jnp.bfloat16))(q)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, whole.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("make", FROM.values(), ids=FROM)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_zeros_or_of_next_to_nothing_gives_zeros(make, kind):
    array = weight(2, 128)
    array[0, :64] = 0
    array[1, 64:] = 1e-40  # not a normal float32: devices take it for 0
    restored = np.asarray(quantize(make(array), kind).dequantize(jnp.float32))
    assert (restored[0, :64] == 0).all() and (restored[1, 64:] == 0).all() and not np.signbit(restored[0, :64]).any()
    assert np.abs(restored[0, 64:]).max() > 1 and np.abs(restored[1, :64]).max() > 1


@pytest.mark.parametrize("make", FROM.values(), ids=FROM)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_floats_stay_finite(make, kind):
    array = np.full((1, 64), np.finfo(np.float32).max)
    array[0, 1::2] *= -1
    restored = np.asarray(quantize(make(array), kind).dequantize(jnp.float32), np.float64)
    # A scale that would round to infinity is the largest bfloat16 instead, 2**-8 below.
    np.testing.assert_allclose(restored, array, rtol=2**-8)


@pytest.mark.parametrize("make", FROM.values(), ids=FROM)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_under_jit_make_their_block_nan(make, kind, bad):
    array = weight(3, 128)
    array[1, 70] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(make(array), kind)
    restored = np.asarray(jax.jit(lambda x: quantize(x, kind).dequantize(jnp.float32))(array))
    assert np.isnan(restored[1, 64:]).all() and np.isfinite(np.delete(restored.reshape(6, 64), 3, 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_on_normal_values_is_that_of_exact_scales(kind):
    array = weight(500, 64, seed=7)
    scales = np.abs(array).max(-1, keepdims=True).astype(np.float64) / levels(kind)[-1]
    nearest = np.abs((array / scales)[..., None] - levels(kind)).argmin(-1)
    exact = np.sqrt(np.square(levels(kind)[nearest] * scales - array).mean())
    restored = np.asarray(quantize(array, kind).dequantize(jnp.float32))
    # A scale is rounded by 2**-8 at most, and its steps with it. Where it is exact the largest of 64 values is too;
    # otherwise that is off by half a step at most: 3/64 of the mean square, which is a twelfth of a step's.
    assert np.sqrt(np.square(restored - array).mean()) == pytest.approx(exact, rel=2**-8 + 3 / 128)
