"""The TPU's attention kernel, interpreted on the CPU, against the attention that all other devices compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, losses, sharding
from jax_it.config import Mesh
from jax_it.data.formats import CausalBatch
from jax_it.models import build, splash_attention
from jax_it.models.attention import Mask, Scores, causal_mask
from jax_it.models.config import ComputeOptions
from jax_it.models.fast_attention import attend

ROWS, LENGTH, HEADS, KEY_HEADS, SIZE = 2, 256, 4, 2, 128


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(ROWS, LENGTH, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[0, :100], segments[0, 100:230] = 1, 2  # the rest is padding
    segments[1] = 1
    return *(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)), jnp.asarray(segments)


def plain(query, key, value, segments, window, cap):
    distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
    mask = Mask(causal_mask(segments).allowed_BTS & (distance < (window or LENGTH)))
    return attend(query, key, value, Scores(SIZE**-0.5, cap), mask, ComputeOptions(jnp.float32))


def by_kernel(query, key, value, segments, window, cap):
    return splash_attention.attend(
        query, key, value, segments, window=window, scale=SIZE**-0.5, softcap=cap, interpret=True
    )


def with_gradients(attend, query, key, value, segments, window, cap):
    real = (segments > 0)[..., None, None]  # what padding attends to is nobody's affair

    def total(*arrays):
        out = jnp.where(real, attend(*arrays, segments, window, cap), 0)
        return jnp.square(out).sum(), out

    (_, out), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


@pytest.mark.parametrize(
    ("window", "cap", "mesh"),
    [
        (0, 0.0, None),
        pytest.param(70, 0.0, None, marks=pytest.mark.slow),
        pytest.param(0, 5.0, None, marks=pytest.mark.slow),
        (70, 5.0, Mesh(data=2, tensor=2)),
    ],
)
def test_the_kernel_gives_the_same_states_and_gradients(arrays, window, cap, mesh):
    expected = jax.jit(lambda *a: with_gradients(plain, *a, window, cap))(*arrays)
    if mesh is None:
        found = jax.jit(lambda *a: with_gradients(by_kernel, *a, window, cap))(*arrays)
    else:
        with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:4])):
            found = jax.jit(lambda *a: with_gradients(by_kernel, *a, window, cap))(*arrays)
    for one, other in zip(found, expected, strict=True):
        # Sums of 256 products in another order, of softmaxes computed block by block.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("shape", "mesh", "fits"),
    [
        ((1024, 8, 4, 128), Mesh(data=8), True),
        ((1024, 8, 4, 128), Mesh(data=2, tensor=4), True),
        ((1024, 8, 2, 128), Mesh(data=2, tensor=4), False),  # two heads of keys cannot go to four devices
        ((1024, 8, 4, 64), Mesh(data=8), False),
        ((1000, 8, 4, 128), Mesh(data=8), False),
        ((1024, 8, 4, 128), Mesh(data=2, context=4), False),
    ],
)
def test_it_is_taken_where_its_lengths_and_heads_allow(shape, mesh, fits):
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert splash_attention.fits(*shape) == fits


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": False, "pad_token_id": None},
        {"model_type": "gemma3_text", "sliding_window": 50, "sliding_window_pattern": 2, "rope_local_base_freq": 10.0},
    ],
    ids=lambda values: values["model_type"],
)
def test_a_model_whose_layers_differ_in_rope_or_window_takes_it_and_learns_the_same(values):
    values |= {
        "vocab_size": 64, "hidden_size": 32, "head_dim": 128, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    model = build(values, "the test", config.Model(pretrained=False))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 128)).astype(np.int32)
    segments = np.repeat([[1] * 60 + [2] * 40 + [0] * 28], 2, axis=0).astype(np.int32)
    places = np.concatenate([np.arange(60), np.arange(40), np.zeros(28, int)])[None].repeat(2, 0).astype(np.int32)
    batch = CausalBatch(tokens, np.roll(tokens, -1, 1), (segments > 0).astype(np.float32), segments, places)

    def learn(splash):
        other = dataclasses.replace(model, options=model.options._replace(fused_attention=splash))

        def loss(params):
            states, head = other.hidden_states(params, batch)[0], other.head(params)
            return losses.chunked_sum(
                losses.cross_entropy, other.logits, 64, head, states, batch.targets_BT, batch.weights_BT
            )[0]

        compute = jax.jit(jax.value_and_grad(loss))
        # Forward, and the backward pass of queries and of keys, in both layers of the period.
        assert str(compute.trace(params).jaxpr).count("name=splash") >= 2 * bool(splash)
        assert ("splash" in str(compute.trace(params).jaxpr)) == bool(splash)
        return compute(params)

    (loss, gradients), (plain_loss, plain_gradients) = learn("interpret"), learn(False)
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))
