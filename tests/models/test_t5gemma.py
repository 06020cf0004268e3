"""What T5Gemma's forward pass depends on, its cache, its config.json. That it is right is tests/parity's to say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jax_it import config, pretrained, sharding
from jax_it.errors import UserError
from jax_it.models import build, fast_attention
from jax_it.models.kv_cache import take_rows
from jax_it.models.lora import is_linear
from jax_it.models.weights import flatten
from tests.models.test_t5 import LENGTHS, forward, matmul_flops, packed, padded
from tests.parity import cases

CASE = cases.BY_NAME["t5gemma_wide"]  # halves of different depth and width, windows of 4
ROUNDING = 2e-5  # of states of order 1: float32's 6e-8 through some thirty sums, as in tests/parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.write(CASE, tmp_path_factory.mktemp("t5gemma"))


@pytest.fixture(scope="module")
def t5gemma(folder):
    return cases.load(folder)


@pytest.fixture(scope="module")
def apply(t5gemma):
    model, params = t5gemma
    compiled = jax.jit(model.hidden_states)
    return lambda batch: np.asarray(compiled(params, batch)[0])


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_example_of_a_packed_row_sees_another(changed, apply):
    seeds = [1, 2, 3]
    before = packed(seeds)
    seeds[changed] = 4
    one, other = apply(before), apply(packed(seeds))
    for segment in (1, 2, 3):
        there = before.segments_BT == segment
        assert np.array_equal(one[there], other[there]) == (segment != changed + 1)


def test_padding_tokens_are_not_seen(apply):
    batch = packed([1, 2, 3])
    noisy = batch._replace(
        source_BGS=np.where(batch.source_segments_BGS > 0, batch.source_BGS, 17),
        tokens_BT=np.where(batch.segments_BT > 0, batch.tokens_BT, 23),
    )
    there = batch.segments_BT > 0
    np.testing.assert_array_equal(apply(noisy)[there], apply(batch)[there])
    assert np.isfinite(apply(noisy)).all()  # also of the row that is padding alone


def test_no_target_position_sees_a_later_one(apply):
    batch = packed([1, 2, 3])
    at = 9  # the third token of the third example
    later = batch.tokens_BT.copy()
    later[0, at] = 97 - later[0, at]
    one, other = apply(batch), apply(batch._replace(tokens_BT=later))
    np.testing.assert_array_equal(one[0, :at], other[0, :at])
    assert (one[0, at:12] != other[0, at:12]).any(-1).all()


def test_packed_examples_have_the_states_of_padded_ones(apply):
    seeds = [1, 2, 3]
    together, alone = apply(packed(seeds)), apply(padded(seeds))
    start = 0
    for row, (_, length) in enumerate(LENGTHS):
        np.testing.assert_allclose(together[0, start : start + length], alone[row, :length], rtol=0, atol=ROUNDING)
        start += length


def test_the_encoders_window_is_as_wide_to_either_side():
    # One layer, whose window is 4 in config.json: a source token is seen from 4 positions away, not from 5.
    encoder = CASE.values["encoder"] | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    model = build({**CASE.values, "encoder": encoder}, "test", config.Model())
    params = model.init(jax.random.key(0))
    source_BS = np.arange(10, 22)[None]
    ones = np.ones_like(source_BS)

    @jax.jit
    def encode(source_BS):
        module = model._module(params)
        positions_BS = np.arange(12)[None]
        return module.encode(source_BS[:, None], ones[:, None], positions_BS[:, None], model.options)

    changed = source_BS.copy()
    changed[0, 6] = 50
    seen = (np.asarray(encode(source_BS)) != np.asarray(encode(changed))).any(-1)[0]
    assert np.flatnonzero(seen).tolist() == list(range(2, 11))


@pytest.mark.parametrize("copies", [1, 2])
def test_single_steps_give_the_logits_of_all_positions_at_once(copies, t5gemma):
    model, params = t5gemma
    batch = padded([1, 2, 3])
    tokens_BT = np.random.RandomState(0).randint(2, 96, (3 * copies, 12))  # three windows long
    tokens_BT[:, 0] = model.config.decoder_start_token_id
    rows_B = np.repeat(np.arange(3), copies)
    ones_BT = np.ones_like(tokens_BT)
    batch = batch._replace(
        source_BGS=batch.source_BGS[rows_B],
        source_segments_BGS=(batch.source_segments_BGS > 0)[rows_B].astype(np.int32),
        source_positions_BGS=batch.source_positions_BGS[rows_B],
        tokens_BT=tokens_BT,
        segments_BT=ones_BT,
        positions_BT=ones_BT * np.arange(12),
    )
    full_BTV = model.logits(model.head(params), jax.jit(model.hidden_states)(params, batch)[0])

    sources = slice(None, None, copies)  # each once; row b is of source b // copies
    first_B, positions_B, cache = model.prefill(
        params, batch.source_BGS[sources, 0], batch.source_segments_BGS[sources, 0], 12
    )
    np.testing.assert_array_equal(first_B, model.config.decoder_start_token_id)
    cache, positions_B = take_rows(cache, rows_B), positions_B[rows_B]
    step = jax.jit(lambda params, *arguments: model.decode_step(model.prepare_for_decoding(params), *arguments))
    for position in range(12):
        logits_BV, cache = step(params, tokens_BT[:, position], positions_B + position, cache)
        np.testing.assert_allclose(logits_BV, full_BTV[:, position], rtol=0, atol=ROUNDING)


def test_recomputing_layers_gives_the_same_gradients_with_dropout_too(folder):
    model, params = cases.load(folder, dropout=0.1)
    batch, key = packed([1, 2, 3]), jax.random.key(0)

    def gradient(remat):
        with_remat = dataclasses.replace(model, options=model.options._replace(remat=remat, recompute=False))
        traced = jax.jit(
            jax.grad(lambda params: jnp.square(with_remat.hidden_states(params, batch, key)[0]).sum())
        ).trace(params)
        assert ("remat" in str(traced.jaxpr) or "checkpoint" in str(traced.jaxpr)) == remat
        return jax.tree.leaves(traced.lower().compile()(params))

    for kept, recomputed in zip(gradient(False), gradient(True), strict=True):
        # What differs is how the operations are fused, and so the order of their sums.
        np.testing.assert_allclose(recomputed, kept, rtol=0, atol=ROUNDING * np.abs(kept).max())


def test_dropout_depends_on_the_key_alone(folder, apply):
    model, params = cases.load(folder, dropout=0.1)
    batch = packed([1, 2, 3])
    drop = jax.jit(lambda key: model.hidden_states(params, batch, key)[0])
    first, again, second = (np.asarray(drop(jax.random.key(seed))) for seed in (0, 0, 1))
    there = batch.segments_BT > 0
    np.testing.assert_array_equal(first, again)
    assert (first[there] != second[there]).any(-1).all()
    assert (first[there] != apply(batch)[there]).any(-1).all()


def random_shapes(program):
    """The shapes of the random numbers that a jaxpr draws."""
    found = set()
    for equation in program.eqns:
        for inner in jaxprs_in_params(equation.params):
            found |= random_shapes(inner)
        if equation.primitive.name == "threefry2x32":
            found.add(equation.outvars[0].aval.shape)
    return found


def test_dropout_acts_on_states_and_in_the_feed_forward_layer_but_not_on_attentions_weights(folder):
    model, params = cases.load(folder, dropout=0.1)
    batch = packed([1, 2, 3])  # 2 rows of 2 blocks of 14 source positions, and of 15 target positions
    assert (batch.source_BGS.shape, batch.tokens_BT.shape) == ((2, 2, 14), (2, 15))
    traced = jax.make_jaxpr(model.hidden_states)(params, batch, jax.random.key(0))
    # Two random words are of eight elements; states have 48 and 32, and 48 are hidden in either feed-forward layer.
    assert random_shapes(traced.jaxpr) == {(4, 14, 6), (2, 15, 4), (2, 15, 6)}
    without, _ = cases.load(folder)  # the rate of config.json is 0
    assert not random_shapes(jax.make_jaxpr(without.hidden_states)(params, batch, jax.random.key(0)).jaxpr)


def test_states_in_bfloat16_are_near_those_in_float32(folder, apply):
    batch = packed([1, 2, 3])
    model, params = cases.load(folder, dtype="bfloat16")
    hidden = jax.jit(model.hidden_states)(params, batch)[0]
    assert hidden.dtype == jnp.bfloat16
    there = batch.segments_BT > 0
    # Thirty roundings to 8 bits, of 2**-9 each, add up to 1 or 2 % of values of order 1.
    difference = (np.asarray(hidden, np.float32) - apply(batch))[there]
    assert difference.std() < 0.04 * apply(batch)[there].std()


def test_adapters_stand_beside_the_linear_layers_of_both_halves(folder):
    lora = config.Lora(rank=2, alpha=4.0, targets=("all-linear",))
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    model, params = pretrained.load(config.Model(path=str(folder), lora=lora), mesh)
    attention = [f"{part}.{name}" for part in ("attention", "cross") for name in ("query", "key", "value", "output")]
    linear = [*attention, *(f"mlp.{name}" for name in ("gate", "up", "down"))]
    wanted = {f"{half}.layers.{path}" for half in ("encoder", "decoder") for path in linear}
    wanted -= {path for path in wanted if path.startswith("encoder.layers.cross")}
    assert {path for path, weight in model.weights.items() if is_linear(weight)} == wanted
    assert {target.path for target in model.adapter.targets} == wanted
    batch = packed([1, 2, 3])
    trained, frozen = model.split(params)
    loss = jax.jit(
        jax.grad(lambda trained: jnp.square(model.hidden_states(model.join(trained, frozen), batch)[0]).sum())
    )
    for path, gradient in flatten(loss(trained)).items():
        assert np.abs(gradient).max() > 0 or path.endswith(".a"), path  # B is 0 at first, so A's gradient is too


LARGE_HALF = {
    "head_dim": 64, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 2048,
}  # fmt: skip


def large(encoder_layers, decoder_layers):
    """A config.json whose halves have these depths, and the encoder another width."""

    def half(name, number, **changes):
        types = ["sliding_attention", "full_attention"] * number
        return {**CASE.values[name], **LARGE_HALF, "num_hidden_layers": number, "layer_types": types[:number]} | changes

    return {
        **CASE.values,
        "encoder": half("encoder", encoder_layers, hidden_size=768),
        "decoder": half("decoder", decoder_layers),
    }


@pytest.mark.parametrize("blocks, source_length, target_length", [(1, 256, 128), (4, 256, 512), (1, 1024, 128)])
def test_counted_flops_are_those_that_xla_counts(blocks, source_length, target_length, monkeypatch):
    monkeypatch.setattr(fast_attention, "MIN_BLOCK", 1 << 30)  # by custom masked scores count too
    # XLA counts a scan's body once, however many layers it runs over: one layer, then.
    model, traced = forward(large(1, 1), blocks, source_length, target_length)
    counted = traced.lower().cost_analysis()["flops"]
    # XLA also counts softmax, norms and caps: some ten operations a score beside 4 × 64 in matmuls.
    assert 0.95 * counted < model.config.flops(source_length, target_length, blocks) < counted


def test_every_layer_is_counted():
    model, traced = forward(large(5, 2), 2, 64, 32)
    assert matmul_flops(traced.jaxpr.jaxpr) == model.config.flops(64, 32, 2)


def test_scores_are_those_that_attention_makes():
    model = build(large(5, 2), "test", config.Model())
    assert model.config.score_count(64, 32, 2) == 8 * (5 * 2 * 64 * 64 + 2 * 32 * (32 + 2 * 64))


def read(**changes):
    return build({**CASE.values, **changes}, "config.json", config.Model()).config


def test_a_half_has_transformers_defaults_and_a_null_cap_is_none():
    half = {"model_type": "t5_gemma_module", "attn_logit_softcapping": None, "num_attention_heads": None}
    found = read(encoder=half, decoder={"bos_token_id": 5})
    assert dataclasses.astuple(found.encoder)[:7] == (256000, 2304, 26, 8, 4, 256, 9216)
    assert (found.encoder.attn_logit_softcap, found.decoder.attn_logit_softcap, found.decoder.final_logit_softcap) == (
        0.0,
        50.0,
        30.0,
    )
    assert [kind.window for kind in found.encoder.layer_kinds] == [4097, 0]  # the token itself, and 4096 to either side
    assert [kind.window for kind in found.decoder.layer_kinds] == [4096, 0]
    assert (found.decoder_start_token_id, found.pad_token_id) == (5, 0)
    assert found.tied and found.decoder.encoder_dim == 2304


def test_what_the_whole_says_of_dropout_holds_for_both_halves():
    encoder = CASE.values["encoder"] | {"dropout_rate": 0.3, "attention_dropout": 0.3, "classifier_dropout_rate": 0.3}
    assert read(encoder=encoder, dropout_rate=0.2).dropout == 0.2


def test_the_vocabulary_is_what_both_halves_know():
    encoder = CASE.values["encoder"] | {"vocab_size": 80}
    assert read(encoder=encoder).vocab_size == 80


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder": CASE.values["encoder"] | {"rope_wobble": 1}}, "config.json: encoder: rope_wobble: not known"),
        (
            {"decoder": CASE.values["decoder"] | {"is_encoder_decoder": True}},
            "config.json: decoder: is_encoder_decoder",
        ),
        ({"decoder": CASE.values["decoder"] | {"model_type": "gemma2"}}, "config.json: decoder: model_type 'gemma2'"),
        ({"encoder": None}, "config.json: encoder is missing"),
        ({"attention_dropout": 0.1}, "config.json: attention_dropout=0.1 is not supported"),
        ({"decoder_start_token_id": 0}, "config.json: decoder_start_token_id=0 is not supported; only 2 is"),
        ({"wobble": 1}, "config.json: wobble: not known"),
    ],
)
def test_what_is_not_implemented_is_an_error_that_names_the_half(changes, message):
    with pytest.raises(UserError) as raised:
        read(**changes)
    assert message in str(raised.value)
