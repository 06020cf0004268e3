"""The balancing loss of a mixture of experts: its formula, and the same value however a step is computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.models.experts import Routing
from tests.training.gradients import MESHES, assert_close, loss_and_gradients

COEFFICIENT = 0.5
EXPERT_MESHES = [
    "1 device", "8 data", "8 fsdp", "2 x 2 x 2", "4 context", "2 x 2 expert", "4 expert", "2 expert x 2 x 2"
]  # fmt: skip


def routed(tiny, batch):
    """Of each layer and token that is no padding: the router's probabilities [..., X] and the experts chosen [..., C].

    Read where a layer hands them on, with nothing compiled and nothing summed.
    """
    seen = []
    of = Routing.of

    def watch(probabilities_BTX, chosen_BTC, real_BT):
        seen.append((np.asarray(probabilities_BTX, np.float64), np.asarray(chosen_BTC)))
        return of(probabilities_BTX, chosen_BTC, real_BT)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(Routing, "of", watch)
        tiny.model.hidden_states(tiny.params, batch)
    assert len(seen) == tiny.model.config.num_layers
    real = batch.segments_BT > 0
    return tuple(np.concatenate([arrays[real] for arrays in both]) for both in zip(*seen, strict=True))


def balancing_loss(probabilities_IX, per_token):
    """(the loss, each expert's share of tokens): Shazeer et al. 2017 as Transformers has it, token by token."""
    tokens, experts = probabilities_IX.shape
    counts = [0] * experts
    for row in probabilities_IX:
        for expert in sorted(range(experts), key=lambda x: -row[x])[:per_token]:
            counts[expert] += 1
    share = np.array(counts) / tokens
    mean = [sum(row[x] for row in probabilities_IX) / tokens for x in range(experts)]
    return experts * sum(f * p for f, p in zip(share, mean, strict=True)), share


@pytest.fixture(scope="module")
def probabilities_IX(tiny_mixtral):
    return routed(tiny_mixtral, tiny_mixtral.padded)[0]


@pytest.fixture(scope="module")
def without(tiny_mixtral):
    """The loss and gradients of the tokens alone."""
    return loss_and_gradients(tiny_mixtral.model, tiny_mixtral.params, tiny_mixtral.padded, MESHES["1 device"], 1)


@pytest.fixture(scope="module")
def expected(tiny_mixtral, probabilities_IX, without):
    """The loss and gradients with the balancing loss: its value by numpy, its gradient with constant shares."""
    model, params, batch, _ = tiny_mixtral
    value, share_X = balancing_loss(probabilities_IX, model.config.experts.per_token)

    @jax.jit
    @jax.grad
    def gradient(params):
        _, routing = model.hidden_states(params, batch)
        return len(share_X) * jnp.dot(share_X.astype(np.float32), routing.probabilities_X) / len(probabilities_IX)

    added = jax.tree.map(lambda g, b: g + COEFFICIENT * np.asarray(b), without[1], gradient(params))
    return without[0] + COEFFICIENT * value, added


def test_the_routing_is_such_as_shows_something(tiny_mixtral, probabilities_IX, without, expected):
    value, share_X = balancing_loss(probabilities_IX, 2)
    assert value > 2.01, "evenly spread tokens give exactly experts per token, 2, and a gradient near 0"
    assert share_X.min() > 0.1 and share_X.sum() == pytest.approx(2)
    router = "layers", "experts", "router"
    one, other = (found[1][router[0]][router[1]][router[2]] for found in (without, expected))
    assert np.abs(one - other).max() > 1e-3, "1e-5 must be small beside what the balancing loss adds"
    ordered = np.sort(probabilities_IX, axis=1)
    assert (ordered[:, -2] - ordered[:, -3]).min() > 1e-6, "a near tie may be rounded either way"


def test_packed_and_padded_tokens_are_sent_alike(tiny_mixtral, probabilities_IX):
    packed_IX, chosen_IC = routed(tiny_mixtral, tiny_mixtral.packed)
    assert packed_IX.shape == probabilities_IX.shape
    for one, other in zip(packed_IX.T, probabilities_IX.T, strict=True):  # the tokens are in another order
        np.testing.assert_allclose(np.sort(one), np.sort(other), rtol=0, atol=1e-5)
    counts = np.bincount(chosen_IC.reshape(-1)) / len(packed_IX)
    np.testing.assert_allclose(counts, balancing_loss(probabilities_IX, 2)[1], rtol=1e-12)


SHORT = [
    ("1 device", 1, "padded"), ("1 device", 4, "packed"), ("8 data", 1, "packed"), ("2 x 2 x 2", 4, "padded"),
    ("4 expert", 1, "packed"), ("2 expert x 2 x 2", 4, "packed"),
]  # fmt: skip
CASES = [
    pytest.param(*case, marks=[] if case in SHORT else [pytest.mark.slow])
    for case in itertools.product(EXPERT_MESHES, [1, 4], ["padded", "packed"])
]


@pytest.mark.parametrize(("mesh", "micro_batches", "rows"), CASES)
def test_the_balancing_loss_does_not_depend_on_how_it_is_computed(tiny_mixtral, expected, mesh, micro_batches, rows):
    model, params, *_ = tiny_mixtral
    batch = getattr(tiny_mixtral, rows)
    found = loss_and_gradients(model, params, batch, MESHES[mesh], micro_batches, router_aux_loss_coef=COEFFICIENT)
    assert_close(found, expected, 1e-5)


def test_without_a_weight_for_it_there_is_no_balancing_loss(tiny_mixtral, without):
    model, params, padded, _ = tiny_mixtral
    found = loss_and_gradients(model, params, padded, MESHES["1 device"], 1, router_aux_loss_coef=0.0)
    assert found[0] == without[0]


def test_a_model_without_experts_takes_no_notice_of_the_setting(tiny):
    plain, asked = (
        loss_and_gradients(tiny.model, tiny.params, tiny.padded, MESHES["1 device"], 1, router_aux_loss_coef=weight)
        for weight in (0.0, 1.0)
    )
    assert plain[0] == asked[0]
    jax.tree.map(np.testing.assert_array_equal, plain[1], asked[1])
