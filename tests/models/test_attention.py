"""The layers against what the papers define, written out slowly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import sharding
from jax_it.config import Mesh
from jax_it.models import attention, fast_attention
from jax_it.models.attention import Mask, Scores
from jax_it.models.config import ComputeOptions
from jax_it.models.dropout import dropout
from jax_it.models.fast_attention import attend
from jax_it.models.norm import Norm
from jax_it.models.relative_bias import RelativeBias
from tests.parity import cases

FLOAT32 = ComputeOptions(jnp.float32)
BOTH_WAYS = pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
BUCKETS = [(32, 128), (8, 16), (8, 20), (16, 64), (32, 256), (4, 8)]


def bucket(distance, bidirectional, buckets, max_distance):
    """T5's bucket of one distance, in whole numbers (Raffel et al. 2020, section 2.1, and its code).

    Half of the buckets are for keys after the query, where those may be attended to. Of the rest, half
    hold one distance each; the others share, in equal parts of the logarithm, the way up to
    `max_distance`, and the last holds all beyond. (d / e) ** n >= (m / e) ** k says that d has come
    through k of the n parts between e and m.
    """
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
    distance = abs(distance) if bidirectional else max(-distance, 0)
    exact = buckets // 2
    parts = buckets - exact
    if distance < exact:
        return first + distance
    passed = [k for k in range(parts) if distance**parts * exact**k >= max_distance**k * exact**parts]
    return first + exact + max(passed)


@BOTH_WAYS
@pytest.mark.parametrize("buckets, max_distance", BUCKETS)
def test_relative_buckets_are_those_of_the_definition(buckets, max_distance, bidirectional):
    distances = np.arange(-600, 601)
    wanted = [bucket(int(d), bidirectional, buckets, max_distance) for d in distances]
    ours = RelativeBias(buckets, max_distance, bidirectional, False).bucket(jnp.asarray(distances))
    np.testing.assert_array_equal(ours, wanted)
    assert set(wanted) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())  # +0 is no distance


def gathered(bias, table_EN, length):
    distance_TS = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    return jnp.moveaxis(table_EN[bias.bucket(distance_TS)], -1, 0)


def bias_of(model, bidirectional):
    half = model.config.encoder if bidirectional else model.config.decoder
    assert half.relative_bias.bidirectional == bidirectional
    return half.relative_bias, half.num_heads


@BOTH_WAYS
@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_bias_is_the_tables_entry_of_each_pairs_bucket(length, bidirectional, t5_1_1):
    bias, heads = bias_of(t5_1_1[0], bidirectional)
    table_EN = jax.random.normal(jax.random.key(0), (bias.buckets, heads))
    ours, wanted = (
        jax.jit(lambda table_EN, f=f: f(bias, table_EN, length))(table_EN) for f in (RelativeBias.square, gathered)
    )
    np.testing.assert_array_equal(ours, wanted)


@BOTH_WAYS
def test_the_biass_gradient_is_that_of_the_gather(bidirectional, t5_1_1):
    (bias, heads), length = bias_of(t5_1_1[0], bidirectional), 40
    table_EN, weights_NTS = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(bias.buckets, heads), (heads, length, length)])
    )
    ours, wanted = (
        jax.jit(jax.grad(lambda table_EN, f=f: (f(bias, table_EN, length) * weights_NTS).sum()))(table_EN)
        for f in (RelativeBias.square, gathered)
    )
    # Sums of up to 1,600 numbers of order 1, in two orders: 6e-8 × √1600 of values up to some √1600.
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


def test_the_bias_is_picked_without_rounding_where_matmuls_round_by_default(t5_1_1):
    bias, heads = bias_of(t5_1_1[0], True)
    program = jax.make_jaxpr(lambda table_EN: bias.square(table_EN, 9))(jnp.zeros((bias.buckets, heads)))
    (product,) = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_a_norm_is_over_the_root_mean_square_and_computed_in_float32():
    random = np.random.RandomState(0)
    x, scale = random.standard_normal((3, 64)), random.standard_normal(64)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    norm = Norm("rms", (64,), 1e-6)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    ours = norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    even = jnp.full((1, 64), 256.0, jnp.bfloat16)
    assert Norm("rms", (64,), 1e-6)(even).dtype == jnp.bfloat16
    np.testing.assert_array_equal(Norm("rms", (64,), 1e-6)(even), jnp.ones((1, 64), jnp.bfloat16))


def test_a_query_that_may_attend_to_nothing_gets_numbers():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    mask = jnp.array([[[True, False, False], [False, False, False], [False, True, True]]])

    def total(x):
        return attend(x, x, x, Scores(), Mask(mask), FLOAT32).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_attention_is_the_softmax_of_scores_and_bias_without_scaling():
    random = np.random.RandomState(0)
    query, key, value = (random.standard_normal((2, length, 3, 4)) for length in (5, 7, 7))
    bias, mask = random.standard_normal((3, 5, 7)), random.rand(2, 5, 7) < 0.7
    scores = np.einsum("btnh,bsnh->bnts", query, key) + bias
    weights = np.exp(np.where(mask[:, None], scores, -np.inf))
    wanted = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
    arrays = (jnp.asarray(array, jnp.float32) for array in (query, key, value))
    ours = attend(*arrays, Scores(), Mask(jnp.asarray(mask)), FLOAT32, bias=jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=5e-6)  # sums of 7 terms of order 1, after exp


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5, 0.999])
def test_dropout_drops_at_its_rate_and_preserves_the_mean(rate):
    shape = (2000, 99)  # 99: not a multiple of the four elements that share a random word
    dropped = np.asarray(dropout(jnp.ones(shape), rate, jax.random.key(0)))
    deviation = (rate / (1 - rate) / dropped.size) ** 0.5  # of the mean of independent values, 0 or 1 / (1 - rate)
    assert abs(dropped.mean() - 1) < 4 * deviation
    spread = (rate * (1 - rate) / dropped.size) ** 0.5
    assert abs((dropped == 0).mean() - rate) < 0.02 * min(rate, 1 - rate) + 4 * spread  # as far as rates are rounded
    assert len(np.unique(dropped)) == 2


@pytest.mark.parametrize("rate, kept", [(1e-12, 99), (1 - 1e-12, 0)])
def test_dropout_of_nearly_nothing_or_everything_is_finite(rate, kept):
    dropped = np.asarray(dropout(jnp.ones(99), rate, jax.random.key(0)))
    assert np.isfinite(dropped).all() and (dropped > 0).sum() == kept


def test_dropout_drops_neighbours_independently():
    dropped = np.asarray(dropout(jnp.ones((1000, 100)), 0.5, jax.random.key(0))) == 0
    for shift in range(1, 9):
        both = (dropped[:, shift:] & dropped[:, :-shift]).mean()
        assert abs(both - 0.25) < 4 * (0.25 * 0.75 / 92_000) ** 0.5  # four deviations of a share of 92,000 pairs


def test_dropout_drops_the_same_elements_however_they_are_sharded():
    x, key = jnp.ones((8, 6, 20)), jax.random.key(0)
    alone = dropout(x, 0.1, key)
    with jax.set_mesh(sharding.make_mesh(Mesh(data=2, context=4))):
        together = jax.jit(lambda x: dropout(sharding.constrain(x, "B T D"), 0.1, key))(x)
    np.testing.assert_array_equal(together, alone)


def test_without_a_key_or_a_rate_nothing_is_dropped():
    x = jax.random.normal(jax.random.key(0), (100,))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(1)) is x


def test_the_bucket_of_a_case_is_used_in_full():
    assert max(cases.SOURCE_LENGTHS) > cases.NEWER["relative_attention_max_distance"]


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_of_some_queries_at_a_time_is_that_of_all_at_once(length, with_bias, monkeypatch):
    random = np.random.default_rng(0)
    query, key, value = (
        jnp.float32(random.standard_normal((2, size, heads, 8))) for size, heads in ((length, 4), (9, 2), (9, 2))
    )
    mask = jnp.asarray(random.random((2, length, 9)) < 0.7).at[:, :, 0].set(True)
    bias = jnp.float32(random.standard_normal((4, length, 9))) if with_bias else None

    def attended(query, key, value):
        return attend(query, key, value, Scores(0.5, softcap=3.0), Mask(mask), FLOAT32, bias=bias)

    def compute():
        gradient = jax.grad(lambda *arrays: jnp.square(attended(*arrays)).sum(), argnums=(0, 1, 2))
        return attended(query, key, value), *gradient(query, key, value)

    whole = compute()
    monkeypatch.setattr(fast_attention, "MAX_QUERIES", 5)
    assert "scan" in str(jax.make_jaxpr(attended)(query, key, value))
    for one, other in zip(compute(), whole, strict=True):
        # The same sums for each query; keys and values add up their gradients in another order.
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-6)


# At once; in parts; in parts of which nothing is kept.
@pytest.mark.parametrize("length, with_bias", [(128, False), (129, True), (300, False), (1100, True)])
def test_causal_attention_leaves_out_keys_that_no_query_sees(length, with_bias, monkeypatch):
    random = np.random.default_rng(2)
    query, key, value = (jnp.float32(random.standard_normal((2, length, heads, 8))) for heads in (4, 2, 2))
    segments = jnp.asarray(np.sort(random.integers(0, 3, (2, length))))
    mask = jnp.tri(length, dtype=bool) & (segments[:, :, None] == segments[:, None])
    bias = jnp.float32(random.standard_normal((4, length, length))) if with_bias else None

    def compute(causal):
        def attended(query, key, value):
            return attend(query, key, value, Scores(0.5), Mask(mask, causal=causal), FLOAT32, bias=bias)

        def squares(*arrays):
            return jnp.square(attended(*arrays)).sum()

        cost = jax.jit(attended).lower(query, key, value).cost_analysis()["flops"]
        return cost, attended(query, key, value), *jax.jit(jax.grad(squares, argnums=(0, 1, 2)))(query, key, value)

    cost, *found = compute(True)
    monkeypatch.setattr(fast_attention, "MAX_QUERIES", 2048)
    whole_cost, *whole = compute(False)
    assert cost < whole_cost * {128: 1.01, 129: 1.0, 300: 0.75, 1100: 0.6}[length]
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length, queries", [(16, 1024), (16, 2), (24, 4)])  # at once, or in chunks
def test_attention_with_queries_on_several_devices_is_that_on_one(length, queries, monkeypatch):
    random = np.random.default_rng(1)
    query, key, value = (jnp.float32(random.standard_normal((2, length, heads, 8))) for heads in (4, 2, 2))
    mask = jnp.asarray(random.random((2, length, length)) < 0.7).at[:, :, 0].set(True)
    bias = jnp.float32(random.standard_normal((4, length, length)))

    def attended(query, key, value):
        query = sharding.constrain(query, "B T N H")
        key, value = (attention.gather_kv(array, len(query)) for array in (key, value))
        return attend(query, key, value, Scores(0.5), Mask(mask), FLOAT32, bias=bias)

    def compute(*arrays):
        gradient = jax.grad(lambda *arrays: jnp.square(attended(*arrays)).sum(), argnums=(0, 1, 2))
        return attended(*arrays), *gradient(*arrays)

    alone = jax.jit(compute)(query, key, value)
    monkeypatch.setattr(fast_attention, "MAX_QUERIES", queries)
    with jax.set_mesh(sharding.make_mesh(Mesh(data=2, context=4))):
        together = jax.jit(compute).lower(query, key, value).compile()
        assert "all-gather" in together.as_text()
        found = together(query, key, value)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)  # either is off by 1e-5 from float64, at most
