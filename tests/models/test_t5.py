"""What a forward pass depends on, and what it does not. That it is right is tests/parity's to say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jax_it import config
from jax_it.data.encoded import Encoded
from jax_it.data.formats import Seq2SeqFormat
from jax_it.data.packing import Shape
from jax_it.models import build, fast_attention
from tests.parity import cases

FORMAT = Seq2SeqFormat(start=0, pad=0)
ANY_MODEL = pytest.mark.parametrize("name", ["t5_1_1", "umt5"])  # shared bias; a bias in every layer
LENGTHS = [(7, 4), (5, 3), (9, 5)]  # source, target


def tokens(seed, length):
    return np.random.RandomState(seed).randint(2, 96, length)


def packed(seeds):
    """Three examples in a row of two blocks, and a row of padding alone; each example's tokens follow from its seed."""
    examples = [
        Encoded(tokens(seed, source), tokens(seed + 1000, target), block)
        for seed, (source, target), block in zip(seeds, LENGTHS, (0, 0, 1), strict=True)
    ]
    return FORMAT.batch([examples, []], Shape(2, 14, 15))


def padded(seeds):
    """The same examples, a row each."""
    examples = [
        [Encoded(tokens(seed, source), tokens(seed + 1000, target), 0)]
        for seed, (source, target) in zip(seeds, LENGTHS, strict=True)
    ]
    return FORMAT.batch(examples, Shape(1, 14, 15))


@pytest.fixture(scope="module")
def apply(request):
    """The compiled forward passes of the session's models, by name."""
    compiled = {}

    def find(name):
        if name not in compiled:
            model, params = request.getfixturevalue(name)
            function = jax.jit(model.hidden_states)
            compiled[name] = lambda batch: np.asarray(function(params, batch)[0])
        return compiled[name]

    return find


@ANY_MODEL
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_example_of_a_packed_row_sees_another(name, changed, apply):
    seeds = [1, 2, 3]
    before = packed(seeds)
    seeds[changed] = 4
    after = packed(seeds)
    one, other = apply(name)(before), apply(name)(after)
    for segment in (1, 2, 3):
        there = before.segments_BT == segment
        # To the bit: what is masked has a weight of exactly 0.
        assert np.array_equal(one[there], other[there]) == (segment != changed + 1)


@ANY_MODEL
def test_padding_tokens_are_not_seen(name, apply):
    batch = packed([1, 2, 3])
    noisy = batch._replace(
        source_BGS=np.where(batch.source_segments_BGS > 0, batch.source_BGS, 17),
        tokens_BT=np.where(batch.segments_BT > 0, batch.tokens_BT, 23),
    )
    assert (noisy.source_BGS != batch.source_BGS).any() and (noisy.tokens_BT != batch.tokens_BT).any()
    there = batch.segments_BT > 0
    np.testing.assert_array_equal(apply(name)(noisy)[there], apply(name)(batch)[there])


@ANY_MODEL
def test_no_target_position_sees_a_later_one(name, apply):
    batch = packed([1, 2, 3])
    at = 9  # the third token of the third example
    later = batch.tokens_BT.copy()
    later[0, at] = 97 - later[0, at]
    one, other = apply(name)(batch), apply(name)(batch._replace(tokens_BT=later))
    np.testing.assert_array_equal(one[0, :at], other[0, :at])
    assert (one[0, at:12] != other[0, at:12]).any(-1).all()


@ANY_MODEL
def test_a_row_of_padding_has_finite_states(name, apply):
    assert np.isfinite(apply(name)(packed([1, 2, 3]))).all()


@ANY_MODEL
def test_packed_examples_have_the_states_of_padded_ones(name, apply):
    seeds = [1, 2, 3]
    together, alone = apply(name)(packed(seeds)), apply(name)(padded(seeds))
    start = 0
    for row, (_, length) in enumerate(LENGTHS):
        # States are of order 1; float32's 6e-8 through some thirty sums, as in tests/parity.
        np.testing.assert_allclose(together[0, start : start + length], alone[row, :length], rtol=0, atol=2e-5)
        start += length


def test_recomputing_layers_gives_the_same_gradients(t5_1_1):
    model, params = t5_1_1
    batch = packed([1, 2, 3])

    def gradient(remat):
        with_remat = dataclasses.replace(model, options=model.options._replace(remat=remat, recompute=False))
        traced = jax.jit(jax.grad(lambda params: jnp.square(with_remat.hidden_states(params, batch)[0]).sum())).trace(
            params
        )
        assert ("remat" in str(traced.jaxpr) or "checkpoint" in str(traced.jaxpr)) == remat
        return jax.tree.leaves(traced.lower().compile()(params))

    for kept, recomputed in zip(gradient(False), gradient(True), strict=True):
        # The same operations on the same numbers: what differs is how they are fused.
        np.testing.assert_allclose(recomputed, kept, rtol=0, atol=2e-6 * np.abs(kept).max())


def test_dropout_depends_on_the_key_alone(t5_1_1, apply):
    model, params = t5_1_1
    batch = packed([1, 2, 3])
    assert model.options.dropout == 0.1
    drop = jax.jit(lambda key: model.hidden_states(params, batch, key)[0])
    first, again, second = (np.asarray(drop(jax.random.key(seed))) for seed in (0, 0, 1))
    there = batch.segments_BT > 0
    np.testing.assert_array_equal(first, again)
    assert (first[there] != second[there]).any(-1).all()
    assert (first[there] != apply("t5_1_1")(batch)[there]).any(-1).all()


def test_a_dropout_rate_of_the_run_replaces_the_models(folder):
    model, params = cases.load(folder, dropout=0.0)
    batch = packed([1, 2, 3])
    programs = [str(jax.make_jaxpr(model.hidden_states)(params, batch, key)) for key in (None, jax.random.key(0))]
    assert not any("threefry2x32" in program for program in programs)


def test_logits_in_bfloat16_are_float32_and_near_those_in_float32(folder, t5_1_1, apply):
    batch = packed([1, 2, 3])
    model, params = t5_1_1
    exact = model.logits(model.head(params), jnp.asarray(apply("t5_1_1")(batch)))
    model, params = cases.load(folder, dtype="bfloat16")
    hidden = jax.jit(model.hidden_states)(params, batch)[0]
    logits = model.logits(model.head(params), hidden)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    there = batch.segments_BT > 0
    # Thirty roundings to 8 bits, of 2**-9 each, add up to 1 or 2 % of values of order 1; the largest is at 4 σ.
    difference = np.asarray(logits - exact)[there]
    assert difference.std() < 0.04 and np.abs(difference).max() < 0.16


def forward(values, blocks, source_length, target_length):
    """A model, and its forward pass with the head on the shapes of one row, not yet compiled."""
    model = build(values, "test", config.Model())
    batch = FORMAT.batch([[]], Shape(blocks, source_length, target_length))
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
    function = jax.jit(lambda params, batch: model.logits(model.head(params), model.hidden_states(params, batch)[0]))
    return model, function.trace(model.shapes, shapes)


LARGE = dict(cases.BY_NAME["t5_1_1"].values) | {"d_model": 512, "d_kv": 64, "d_ff": 1024, "vocab_size": 2048}


@pytest.mark.parametrize(
    "values, blocks, source_length, target_length",
    [
        (LARGE, 1, 256, 128),
        (LARGE, 4, 256, 512),
        (LARGE, 1, 1024, 128),
        (LARGE | {"feed_forward_proj": "relu", "num_heads": 12}, 2, 128, 256),
    ],
)
def test_counted_flops_are_those_that_xla_counts(values, blocks, source_length, target_length, monkeypatch):
    monkeypatch.setattr(fast_attention, "MIN_BLOCK", 1 << 30)  # by custom masked scores count too
    # XLA counts a scan's body once, however many layers it runs over: one layer, then.
    values = values | {"num_layers": 1, "num_decoder_layers": 1}
    model, traced = forward(values, blocks, source_length, target_length)
    counted = traced.lower().cost_analysis()["flops"]
    ours = model.config.flops(source_length, target_length, blocks)
    # XLA also counts additions of bias, softmax and norms: some ten operations a score beside 4 × 64 in matmuls.
    assert 0.95 * counted < ours < counted


def matmul_flops(program):
    """Of a jaxpr's matrix products, with those inside scans counted as often as they run."""
    total = 0
    for equation in program.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * matmul_flops(inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * np.prod([sizes[axis] for axis in contracted])
    return total


def test_every_layer_is_counted():
    values = LARGE | {"num_layers": 5, "num_decoder_layers": 2}
    model, traced = forward(values, 2, 64, 32)
    c = model.config
    bias = (
        2 * (2 * 64 + 2 * 32) * c.encoder.relative_bias.buckets * c.encoder.num_heads
    )  # picked out of its table by a small product
    assert matmul_flops(traced.jaxpr.jaxpr) == c.flops(64, 32, 2) + bias
