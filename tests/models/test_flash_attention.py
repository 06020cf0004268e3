"""Our attention kernel for TPUs, interpreted on the CPU, against the attention that all other devices compute."""

import dataclasses
import itertools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import losses, sharding
from jax_it.config import Mesh
from jax_it.data.formats import Seq2SeqBatch
from jax_it.models import flash_attention
from jax_it.models.attention import Scores, by_head, causal_mask, plain_attention, segment_mask
from jax_it.models.config import ComputeOptions
from jax_it.models.dropout import rounded_rate
from jax_it.models.fast_attention import attend
from jax_it.models.relative_bias import RelativeBias

ROWS = 2


class Case(NamedTuple):
    """What to compute; by default three tiles of queries and of keys, whose length is not a multiple of 128."""

    queries: int = 300
    keys: int = 300
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64  # two heads fill a vector
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    scale: float = 1.0
    dropout: float = 0.0
    bias: bool = False

    @property
    def scores(self):
        return Scores(self.scale, self.softcap, self.dropout)

    @property
    def relative(self):
        return RelativeBias(32, 64, not self.causal, per_layer=False)


KEY = jax.random.key(7)  # of dropout


def segments(length):
    """Three examples and padding, which begin and end elsewhere in each row."""
    ends = [[0.25, 0.6, 0.9, 1], [0.1, 0.8, 0.85, 1]]
    return np.array([np.searchsorted(np.array(row) * length, np.arange(length), "right") + 1 for row in ends]) % 4


def arrays(case):
    """Return queries, keys, values, a table of biases, and the gradient of the result, of which padding has none."""
    keys = jax.random.split(jax.random.key(0), 5)
    query_shape = ROWS, case.queries, case.heads, case.head_dim
    key_shape = ROWS, case.keys, case.kv_heads, case.head_dim
    shapes = query_shape, key_shape, key_shape, (32, case.heads), query_shape
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return *drawn[:4], jnp.where(segments(case.queries)[..., None, None] > 0, drawn[4], 0)


def by_kernel(case, query, key, value, table):
    bias = case.relative.by_distance(table, case.queries) if case.bias else None
    both = (jnp.asarray(segments(length), jnp.int32) for length in (case.queries, case.keys))
    return flash_attention.attend(
        query, key, value, case.scores, *both, causal=case.causal, window=case.window, bias=bias, dropout_key=KEY,
        interpret=True,
    )  # fmt: skip


def plain(case, query, key, value, table):
    mask = segments(case.queries)[:, :, None] == segments(case.keys)[:, None]
    distance = np.arange(case.queries)[:, None] - np.arange(case.keys)
    if case.causal:
        mask &= distance >= 0
    if case.window:
        mask &= np.abs(distance) < case.window
    bias = case.relative.square(table, case.queries) if case.bias else None
    if not case.dropout:
        return plain_attention(query, *by_head(key, value), case.scores, jnp.asarray(mask), bias)
    # Dropout by the kernel's own bits.
    key, value = (jnp.repeat(x, case.heads // case.kv_heads, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * case.scale
    scores = case.softcap * jnp.tanh(scores / case.softcap) if case.softcap else scores
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores if bias is None else scores + bias, -1e30))
    size, dropped = rounded_rate(case.dropout)
    weights *= kept_of(case, size, dropped) / (1 - dropped / 2**size)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def kept_of(case, size, dropped):
    """Return which weights [B, N, T, S] dropout leaves."""
    (queries, keys), seed = (
        (-(-length // 128) * 128 for length in (case.queries, case.keys)),
        jax.random.bits(KEY, (2,)),
    )
    seed = jax.lax.bitcast_convert_type(seed, jnp.int32)

    def of_head(row, head):
        words = flash_attention.random_words(*seed, row, head, size, (0, 0), (keys, queries), queries)
        return flash_attention.kept(words, size, dropped).T[: case.queries, : case.keys]

    return jax.vmap(jax.vmap(of_head, (None, 0)), (0, None))(jnp.arange(ROWS), jnp.arange(case.heads))


def with_gradients(attend, case, *arrays):
    """Return the result where there is no padding, and the gradients of queries, keys, values and biases."""
    *arrays, gradient = arrays
    attended, pull = jax.vjp(lambda *arrays: attend(case, *arrays), *arrays)
    return jnp.where(segments(case.queries)[..., None, None] > 0, attended, 0), *pull(gradient)


def check(case, mesh=None):
    inputs = arrays(case)
    expected = jax.jit(lambda *inputs: with_gradients(plain, case, *inputs))(*inputs)
    if mesh is None:
        found = jax.jit(lambda *inputs: with_gradients(by_kernel, case, *inputs))(*inputs)
    else:
        with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:4])):
            found = jax.jit(lambda *inputs: with_gradients(by_kernel, case, *inputs))(*inputs)
    for one, other in zip(found, expected, strict=True):
        # Sums of some hundred products in another order, of softmaxes computed tile by tile.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(np.abs(other).max(), 1e-3))


CASES = {
    "encoder": Case(bias=True),
    "encoder_window": Case(window=70, scale=0.2, head_dim=16),
    "decoder": Case(causal=True, bias=True, dropout=0.1),
    "cross": Case(queries=100, keys=384, dropout=0.1),
    "grouped": Case(heads=4, causal=True, window=140, softcap=5.0, scale=0.2, bias=True, dropout=0.003),
}


@pytest.mark.parametrize(
    "name", ["cross", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "cross")]
)
def test_the_kernel_gives_the_same_states_and_gradients(name):
    check(CASES[name])


def test_it_does_on_a_mesh_and_drops_the_same_weights():
    check(Case(128, 128, heads=4, bias=True, causal=True, dropout=0.1), Mesh(data=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "causal, window, softcap, dropout, bias",
    list(itertools.product([False, True], [0, 50], [0.0, 5.0], [0.0, 0.1], [False, True])),
)
def test_all_options_go_together(causal, window, softcap, dropout, bias):
    check(Case(128, 128, 2, 1, 8, causal, window, softcap, 0.3, dropout, bias))


def test_tiles_that_segments_mask_are_not_computed():
    case = Case(384, 384, 1, 1)
    own = jnp.asarray(np.repeat([[1, 2, 3]], 128, axis=1), jnp.int32)
    query, key, value, _, gradient = (x[:1] for x in arrays(case))

    def attend(query, key, value):
        return flash_attention.attend(query, key, value, case.scores, own, own, interpret=True)

    @jax.jit
    def compute(key, gradient):
        attended, pull = jax.vjp(attend, query, key, value)
        return attended, *pull(gradient)

    found = compute(key.at[:, 256:].set(jnp.nan), gradient.at[:, 256:].set(jnp.nan))
    # Whatever a tile computed of these, masked or not, would not be a number.
    for x in found:
        assert np.isfinite(x[:, :256]).all() and np.isnan(x[:, 256:]).any()


@pytest.mark.parametrize(
    "causal, window, segment", [(False, 0, 384), (True, 0, 384), (True, 100, 384), (False, 200, 100)]
)
def test_the_blocks_of_keys_that_are_read_are_those_that_a_query_sees(causal, window, segment):
    a = flash_attention.describe((1, 384, 2, 64), (1, 384, 2, 64), scores=Scores(), causal=causal, window=window)
    own = np.arange(384)[None] // segment + 1
    distance = np.arange(384)[:, None] - np.arange(384)
    seen = (own[0, :, None] == own) & (distance >= (0 if causal else -384)) & (np.abs(distance) < (window or 384))
    seen = seen.reshape(3, 128, 3, 128).any((1, 3))
    first, end = flash_attention._key_blocks(a, jnp.asarray(own), jnp.asarray(own))
    for block in range(3):
        assert np.flatnonzero(seen[block]).tolist() == list(range(first[0, block], end[0, block]))


@pytest.mark.parametrize("rate", [0.1, 0.003, 1e-5])
def test_dropout_drops_its_rate_anywhere(rate):
    size, dropped = rounded_rate(rate)

    def words(row, head, first=(0, 0), shape=(512, 512)):
        return flash_attention.random_words(3, 4, row, head, size, first, shape, 512)

    all_kept = np.array([flash_attention.kept(words(row, head), size, dropped) for row in (0, 1) for head in (0, 1)])
    expected = dropped / 2**size
    for axes in ((0, 1, 2), (1, 2), (0, 1), (0, 2)):  # together, in each head, for each query, for each key
        share, number = 1 - all_kept.mean(axes), all_kept.size / all_kept.mean(axes).size
        assert np.abs(share - expected).max() < 5 * np.sqrt(expected / number) + 5 / number
    # A tile has the bits of its positions, however the row is cut.
    part = flash_attention.kept(words(1, 0, (128 * size // 32, 256), (128, 128)), size, dropped)
    np.testing.assert_array_equal(part, all_kept[2, 128:256, 256:384])
    if size == 8:  # heads, rows, neighboring queries and keys agree as often as if they were independent
        agree = (1 - expected) ** 2 + expected**2
        pairs = [(all_kept[0], x) for x in all_kept[1:]]
        pairs += [(all_kept[0, :, 1:], all_kept[0, :, :-1])]
        pairs += [(all_kept[0, n:], all_kept[0, :-n]) for n in (1, 8, 16)]
        for one, other in pairs:
            assert (one == other).mean() == pytest.approx(agree, abs=0.003)


@pytest.mark.parametrize(
    ("shape", "mesh", "bias", "fits"),
    [
        ((512, 32, 32, 64), Mesh(data=8), True, True),
        ((512, 32, 32, 64), Mesh(data=2, tensor=4), True, True),
        ((512, 6, 6, 64), Mesh(data=2, tensor=4), True, False),  # six heads cannot go to four devices
        ((512, 32, 32, 64), Mesh(data=2, context=4), True, False),
        ((4096, 8, 8, 64), Mesh(data=8), False, True),
        ((4096, 8, 8, 64), Mesh(data=8), True, False),  # too many tiles of biases for a chip's memory
        ((16384, 16, 8, 256), Mesh(data=8), False, False),  # rows too long
    ],
)
def test_it_is_taken_where_its_heads_and_the_chips_memory_allow(shape, mesh, bias, fits):
    length, heads, kv_heads, head_dim = shape
    with jax.set_mesh(sharding.make_mesh(mesh)):
        query, key = (jax.ShapeDtypeStruct((8, length, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads))
        assert flash_attention.fits(query, key, bias=bias, causal=False) == fits


def test_an_old_chip_takes_it_for_short_rows_alone(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v4")])
    for length, fits in ((512, True), (1024, False)):
        query = jax.ShapeDtypeStruct((8, length, 32, 64), jnp.bfloat16)
        assert flash_attention.fits(query, query, bias=True, causal=False) == fits


@pytest.mark.parametrize("mask", ["segments", "prefix"])
def test_a_mask_that_segments_do_not_tell_is_left_to_plain_attention(mask):
    query = jnp.ones((1, 16, 2, 8))
    own, options = jnp.ones((1, 16), jnp.int32), ComputeOptions(jnp.float32, fused_attention="interpret")
    given = segment_mask(own, own) if mask == "segments" else causal_mask(own, prefix_BT=own)
    jaxpr = jax.make_jaxpr(lambda query: attend(query, query, query, Scores(), given, options))(query)
    assert ("flash_attention" in str(jaxpr)) == (mask == "segments")


@pytest.mark.parametrize(
    "name, mesh", [("t5_1_1", None), pytest.param("umt5", Mesh(data=2, tensor=2), marks=pytest.mark.slow)]
)
def test_a_t5_that_takes_it_learns_the_same(name, mesh, request):
    model, params = request.getfixturevalue(name)
    params = jax.tree.map(np.asarray, params)  # on no device yet
    rng, blocks, length, targets = np.random.default_rng(0), 2, 24, 20
    source_segments = np.repeat([[[1, 1, 2, 0], [3, 3, 3, 0]], [[1, 1, 1, 1], [2, 2, 0, 0]]], length // 4, axis=2)
    own = np.repeat([[1, 2, 3, 0], [1, 2, 2, 0]], targets // 4, axis=1)

    def positions(segments):
        return np.arange(segments.shape[-1]) - (segments[..., None, :] < segments[..., None]).sum(-1)

    tokens = rng.integers(2, 96, (2, targets))
    batch = Seq2SeqBatch(
        source_BGS=rng.integers(2, 96, (2, blocks, length)), source_segments_BGS=source_segments,
        source_positions_BGS=positions(source_segments), tokens_BT=tokens, targets_BT=np.roll(tokens, -1, 1),
        weights_BT=(own > 0).astype(np.float32), segments_BT=own, positions_BT=positions(own),
    )  # fmt: skip

    def learn(fused):
        options = model.options._replace(fused_attention=fused, remat=mesh is not None)
        other = dataclasses.replace(model, options=options)

        def loss(params):
            states, head = other.hidden_states(params, batch)[0], other.head(params)
            return losses.chunked_sum(
                losses.cross_entropy, other.logits, 64, head, states, batch.targets_BT, batch.weights_BT
            )[0]

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        for kind in ("forward", "backward"):  # in the encoder, the decoder and cross-attention
            assert (str(traced.jaxpr).count(f"flash_attention_{kind}") >= 3) == bool(fused)
        return traced.lower().compile()(params)

    plain_loss, plain_gradients = learn(False)
    if mesh is None:
        loss, gradients = learn("interpret")
    else:
        with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:4])):
            loss, gradients = learn("interpret")
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))
