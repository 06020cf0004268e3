"""Token losses against their formulas in numpy's float64, and the sum in chunks against the whole."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import losses

B, T, V, D = 3, 10, 37, 8


def cross_entropy(logits_BTV, targets_BT, label_smoothing=0.0, z_loss=0.0):
    """The formula of torch.nn.functional.cross_entropy, with PaLM's z-loss."""
    largest_BT = logits_BTV.max(-1)
    log_z_BT = largest_BT + np.log(np.exp(logits_BTV - largest_BT[..., None]).sum(-1))
    log_p_BTV = logits_BTV - log_z_BT[..., None]
    true_BT = np.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
    smooth_BT = log_p_BTV.sum(-1) / logits_BTV.shape[-1]
    return -(1 - label_smoothing) * true_BT - label_smoothing * smooth_BT + z_loss * log_z_BT**2


def squared_error(logits_BTV, targets_BT, scale, target):
    """Hui & Belkin 2020, section 2, entry by entry."""
    loss_BT = np.zeros(targets_BT.shape)
    for b, t, v in np.ndindex(logits_BTV.shape):
        logit = logits_BTV[b, t, v]
        loss_BT[b, t] += scale * (logit - target) ** 2 if v == targets_BT[b, t] else logit**2
    return loss_BT / logits_BTV.shape[-1]


LOSSES = {
    "plain": (losses.cross_entropy, cross_entropy, {}),
    "smoothed": (losses.cross_entropy, cross_entropy, {"label_smoothing": 0.1}),
    "z-loss": (losses.cross_entropy, cross_entropy, {"z_loss": 1e-2}),
    "both": (losses.cross_entropy, cross_entropy, {"label_smoothing": 0.1, "z_loss": 1e-2}),
    "squared": (losses.squared_error, squared_error, {"scale": 15.0, "target": 30.0}),
}
ANY_LOSS = pytest.mark.parametrize("name", ["plain", "both", "squared"])


def arrays(dtype=np.float32):
    """head_VD, hidden_BTD, targets_BT, weights_BT; a fifth of the weights is 0, and they need not be 1."""
    random = np.random.RandomState(0)
    weights_BT = random.choice([0, 0.25, 1, 1, 2], (B, T))
    return (
        random.standard_normal((V, D)).astype(dtype),
        random.standard_normal((B, T, D)).astype(dtype),
        random.randint(0, V, (B, T)).astype(np.int32),
        weights_BT.astype(dtype),
    )


def logits(head_VD, hidden):
    return jnp.einsum("...D,VD->...V", hidden, head_VD)


def in_chunks(name, chunk, head_VD, hidden_BTD, targets_BT, weights_BT, **options):
    loss, _, settings = LOSSES[name]
    given = (head_VD, hidden_BTD, targets_BT, weights_BT)
    return losses.chunked_sum(partial(loss, **settings), logits, chunk * len(hidden_BTD), *given, **options)


def at_once(name, head_VD, hidden_BTD, targets_BT, weights_BT):
    loss, _, settings = LOSSES[name]
    return (weights_BT * loss(logits(head_VD, hidden_BTD), targets_BT, **settings)).sum()


def in_numpy(name, head_VD, hidden_BTD, targets_BT, weights_BT):
    _, formula, settings = LOSSES[name]
    return (weights_BT * formula(hidden_BTD @ head_VD.T, targets_BT, **settings)).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_loss_is_its_formula(name):
    loss, formula, settings = LOSSES[name]
    random = np.random.RandomState(1)
    logits_BTV, targets_BT = 10 * random.standard_normal((B, T, V)), random.randint(0, V, (B, T))
    ours = loss(jnp.asarray(logits_BTV, jnp.float32), jnp.asarray(targets_BT), **settings)
    assert ours.dtype == jnp.float32
    # Squared errors cancel the true class out of a sum of squares: a few 6e-8 of the sum, beside losses of its size.
    np.testing.assert_allclose(ours, formula(logits_BTV, targets_BT, **settings), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e30])
def test_cross_entropy_of_extreme_logits_is_finite(size):
    logits_BTV = jnp.zeros((1, 1, 4)).at[0, 0, 0].set(size)
    assert losses.cross_entropy(logits_BTV, jnp.array([[0]]))[0, 0] == pytest.approx(np.log(4) if size < 1 else 0)
    assert losses.cross_entropy(logits_BTV, jnp.array([[1]]))[0, 0] == pytest.approx(np.log(4) if size < 1 else size)


@ANY_LOSS
@pytest.mark.parametrize("chunk", [1, 4, 5, 64])  # of 10 positions: 4 does not divide them, 64 is longer
def test_the_sum_in_chunks_is_the_sum(name, chunk):
    total, weight = jax.jit(partial(in_chunks, name, chunk))(*arrays())
    wide = arrays(np.float64)
    assert (total.dtype, weight.dtype) == (jnp.float32, jnp.float32)
    assert weight == wide[-1].sum()  # exact: quarters
    assert total == pytest.approx(in_numpy(name, *wide), rel=2e-6)  # float32's 6e-8, over sums of 30 and of 37


@pytest.mark.parametrize("chunk", [4, 64])
@ANY_LOSS
def test_gradients_in_chunks_are_those_at_once(name, chunk):
    given = arrays()

    def mean(head_VD, hidden_BTD, *rest):
        total, weight = in_chunks(name, chunk, head_VD, hidden_BTD, *rest)
        return total / weight

    ours = jax.jit(jax.grad(mean, argnums=(0, 1)))(*given)
    wanted = jax.jit(jax.grad(partial(at_once, name), argnums=(0, 1)))(*given)
    for gradient, whole in zip(ours, wanted, strict=True):
        scale = np.abs(whole).max()
        # Sums of 30 products in two orders: √30 × 6e-8 of the largest, a few times over.
        np.testing.assert_allclose(gradient * given[-1].sum(), whole, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("chunk", [4, 64])
@ANY_LOSS
def test_a_head_that_is_not_trained_gets_no_gradient_and_the_rest_stays_as_it_is(name, chunk):
    given = arrays()

    def of(trained):
        def total(head_VD, hidden_BTD, *rest):
            return in_chunks(name, chunk, head_VD, hidden_BTD, *rest, head_trained=trained)

        function = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        return function(*given)

    one, (for_head, for_hidden) = of(True)
    other, (none, same) = of(False)
    np.testing.assert_array_equal(other, one)
    np.testing.assert_array_equal(same, for_hidden)
    assert for_head.any() and not none.any() and none.shape == for_head.shape


@ANY_LOSS
def test_gradients_are_those_of_finite_differences(name):
    given = arrays(np.float64)
    random = np.random.RandomState(2)
    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(lambda *given: in_chunks(name, 3, *given)[0], argnums=(0, 1)))(*given)
    gradients = [np.asarray(gradient) for gradient in gradients]
    assert {gradient.dtype.name for gradient in gradients} == {"float64"}
    step = 1e-5
    for _ in range(5):
        direction = [random.standard_normal(array.shape) for array in given[:2]]

        def moved(by, direction=direction):
            return in_numpy(name, *(a + by * d for a, d in zip(given, direction, strict=False)), *given[2:])

        slope = (moved(step) - moved(-step)) / (2 * step)
        ours = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        # The third derivative's 1e-10, and 1e-16 / 1e-5 of a total up to 1e5.
        assert float(ours) == pytest.approx(slope, rel=1e-8, abs=1e-5 if name == "squared" else 1e-7)


@ANY_LOSS
def test_positions_of_weight_0_take_no_part(name):
    head_VD, hidden_BTD, targets_BT, weights_BT = arrays()
    left_out = weights_BT == 0
    assert left_out.any()
    gradient = jax.jit(jax.value_and_grad(lambda hidden, *rest: in_chunks(name, 4, head_VD, hidden, *rest)[0]))
    total, slope = gradient(hidden_BTD, targets_BT, weights_BT)
    assert not slope[left_out].any() and slope[~left_out].any(-1).all()
    other_hidden, other_targets = hidden_BTD.copy(), targets_BT.copy()
    other_hidden[left_out] *= -100
    other_targets[left_out] = 0
    assert gradient(other_hidden, other_targets, weights_BT)[0] == total


@ANY_LOSS
def test_a_batch_without_targets_weighs_nothing_and_moves_nothing(name):
    head_VD, hidden_BTD, targets_BT, weights_BT = arrays()
    found = jax.jit(jax.value_and_grad(partial(in_chunks, name, 4), argnums=(0, 1), has_aux=True))
    (total, weight), gradients = found(head_VD, hidden_BTD, targets_BT, np.zeros_like(weights_BT))
    assert total == 0 and weight == 0
    assert not any(gradient.any() for gradient in gradients)


def largest_array(compiled):
    """Elements of the largest array that a compiled program's text names."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def test_no_array_of_all_logits_is_in_the_compiled_step():
    rows, length, vocabulary, width, chunk = 3, 14, 1013, 8, 4
    shapes = (
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), jnp.float32),
    )
    assert vocabulary * width < rows * length * vocabulary  # nothing else is as large as the logits

    def compiled(total):
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes).compile()

    assert largest_array(compiled(lambda *given: in_chunks("both", chunk, *given)[0])) == rows * chunk * vocabulary
    assert largest_array(compiled(partial(at_once, "both"))) >= rows * length * vocabulary  # so would it be seen
