"""A stack that repeats a period of layer kinds: what it groups, scans and caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config
from jax_it.models import build, sections
from jax_it.models.config import LayerKind, shortest_period

# Two periods of three layers and one layer left over, whose windows and ropes differ.
GEMMA_3 = {
    "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
    "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5,
    "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 1e2,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
}  # fmt: skip
PROMPTS = np.random.default_rng(0).integers(2, 64, (2, 12)).astype(np.int32)
SEGMENTS = (np.arange(12) < np.array([[12], [4]])).astype(np.int32)  # beyond the window, and within it


def make(values, unrolled):
    model = build(values, "test", config.Model(pretrained=False))
    model = dataclasses.replace(model, options=model.options._replace(unrolled=unrolled))
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.parametrize(
    "windows, period",
    [((0, 0, 0), (0,)), ((4, 0, 4, 0), (4, 0)), ((4, 4, 0, 4), (4, 4, 0)), ((0, 4, 4), (0, 4, 4)), ((4,), (4,))],
)
def test_a_period_is_the_shortest_that_gives_all_layers(windows, period):
    kinds = shortest_period([LayerKind(window) for window in windows])
    assert tuple(kind.window for kind in kinds) == period


def test_a_layer_with_a_window_caches_the_window_alone():
    model, params = make(GEMMA_3, unrolled=False)
    _, _, cache = jax.eval_shape(lambda params: model.prefill(params, PROMPTS, SEGMENTS, 6), params)
    # The groups of the period's two runs, then the layer that is left over.
    assert cache.windows == (5, 0, 5)
    assert [group.key.shape for group in cache.groups] == [(4, 2, 2, 8, 5), (2, 2, 2, 8, 18), (1, 2, 2, 8, 5)]
    unrolled, _ = make(GEMMA_3, unrolled=True)
    _, _, cache = jax.eval_shape(lambda params: unrolled.prefill(params, PROMPTS, SEGMENTS, 6), params)
    assert [group.key.shape[0] for group in cache.groups] == [1] * 7
    assert [group.value.shape[3] for group in cache.groups] == [5, 5, 18, 5, 5, 18, 5]


@pytest.mark.parametrize("values", [GEMMA_3, T5], ids=lambda values: values["model_type"])
def test_steps_are_the_same_by_a_scan_and_layer_by_layer(values):
    tokens = np.random.default_rng(1).integers(2, 64, (8, 2)).astype(np.int32)
    found = []
    for unrolled in (False, True):
        model, params = make(values, unrolled)

        @jax.jit
        def decode(params, model=model):
            prepared = model.prepare_for_decoding(params)
            first_B, start_B, cache = model.prefill(params, PROMPTS, SEGMENTS, 9)

            def step(carry, xs):
                positions_B, cache = carry
                logits_BV, cache = model.decode_step(prepared, xs, positions_B, cache)
                return (positions_B + 1, cache), logits_BV

            xs = jnp.concatenate([first_B[None], tokens])
            return jax.lax.scan(step, (start_B, cache), xs)[1]

        found.append(decode(params))
    # The same sums, fused otherwise: states of order 1 through some thirty float32 sums.
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-5)
    assert np.abs(found[0]).max() > 0.1


def test_layers_are_grouped_into_the_runs_of_whole_periods_and_of_the_rest():
    model, params = make(GEMMA_3, unrolled=False)
    module = model._module(params)
    local, full, left_over = sections.group_layers(module.layers, module.sections)
    weight = params["layers"]["mlp"]["up"]
    periods = weight[:6].reshape(2, 3, 32, 48)
    np.testing.assert_array_equal(local.mlp.up[...], periods[:, :2])
    np.testing.assert_array_equal(full.mlp.up[...], periods[:, 2:])
    np.testing.assert_array_equal(left_over.mlp.up[...], weight[6:][None])
    alone = sections.group_layers(module.layers, sections.unrolled(module.config))
    for layer, own in zip(alone, weight, strict=True):
        np.testing.assert_array_equal(layer.mlp.up[...], own[None, None])
