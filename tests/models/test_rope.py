"""Rotary positions against the papers' formulas, written out in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.models import rope
from jax_it.models.config_json import ConfigReader
from jax_it.models.rope import CosSin, Rope, rotate

HEAD_DIM, THETA, ORIGINAL = 32, 1e4, 256


def read(**scaling):
    values = {"rope_theta": THETA, "max_position_embeddings": 4 * ORIGINAL, "rope_scaling": scaling}
    return rope.read(ConfigReader(values, "the test"), HEAD_DIM)


def plain():
    """Radians a position of each pair (Su et al. 2021, equation 15)."""
    return [THETA ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]


def linear(factor):
    """Chen et al. 2023: positions are divided by the factor."""
    return [frequency / factor for frequency in plain()]


def llama3(factor, low, high):
    """Llama 3.1's model.py: by the number of waves that fit into the original length."""
    scaled = []
    for frequency in plain():
        waves = ORIGINAL * frequency / (2 * math.pi)
        kept = min(1, max(0, (waves - low) / (high - low)))
        scaled.append(kept * frequency + (1 - kept) * frequency / factor)
    return scaled


def yarn(factor, fast, slow, truncate=True):
    """Peng et al. 2023, section 3.2: a ramp over pairs between those that turn `fast` and `slow` times."""

    def pair(turns):
        return HEAD_DIM * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    first, last = pair(fast), pair(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    scaled = []
    for i, frequency in enumerate(plain()):
        ramp = min(1, max(0, (i - first) / (last - first)))
        scaled.append((1 - ramp) * frequency + ramp * frequency / factor)
    return scaled


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
MSCALES = {"mscale": 0.7, "mscale_all_dim": 0.3}
SHORT, LONG = [1 + 0.1 * i for i in range(16)], [2 + 0.5 * i for i in range(16)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}


def length(**scaling):
    return scaling | {"original_max_position_embeddings": ORIGINAL}


@pytest.mark.parametrize(
    ("scaling", "frequencies", "scale"),
    [
        ({}, plain(), 1),
        ({"rope_type": "linear", "factor": 2.5}, linear(2.5), 1),
        (length(**LLAMA3), llama3(8, 1, 4), 1),
        (length(**YARN), yarn(4, 32, 1), 0.1 * math.log(4) + 1),
        (length(**YARN, beta_fast=20.0, beta_slow=2.0, truncate=False), yarn(4, 20, 2, False), 0.1 * math.log(4) + 1),
        (length(**YARN, attention_factor=0.9), yarn(4, 32, 1), 0.9),
        (length(**YARN, **MSCALES), yarn(4, 32, 1), (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)),
        (
            length(**LONGROPE),
            [frequency / short for frequency, short in zip(plain(), SHORT, strict=True)],
            math.sqrt(1 + math.log(4) / math.log(ORIGINAL)),
        ),
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn_ends", "yarn_factor", "yarn_mscale", "longrope"],
)
def test_each_scaling_is_its_formula(scaling, frequencies, scale):
    found = read(**scaling)
    np.testing.assert_allclose(found.frequencies, frequencies, rtol=1e-6)  # float32, through a power and a few products
    assert found.scale == pytest.approx(scale, rel=1e-6)
    positions = np.array([[0, 1, 100, ORIGINAL - 1]])
    cos_sin = found.cos_sin(jnp.asarray(positions), jnp.full(positions.shape, ORIGINAL))
    angles = positions[..., None] * np.array(frequencies)
    # An angle of up to 255 radians is off by 3e-5 in float32.
    np.testing.assert_allclose(cos_sin.cos_BTU, np.cos(angles) * scale, rtol=0, atol=1e-4)
    np.testing.assert_allclose(cos_sin.sin_BTU, np.sin(angles) * scale, rtol=0, atol=1e-4)


def test_longrope_rotates_texts_that_outgrow_the_original_length_by_the_long_factors():
    found = read(**length(**LONGROPE))
    positions, lengths = jnp.full((1, 2), 3), jnp.array([[ORIGINAL, ORIGINAL + 1]])
    cos_sin = found.cos_sin(positions, lengths)
    scale = math.sqrt(1 + math.log(4) / math.log(ORIGINAL))
    for row, factors in zip(cos_sin.cos_BTU[0], (SHORT, LONG), strict=True):
        wanted = [math.cos(3 * frequency / factor) for frequency, factor in zip(plain(), factors, strict=True)]
        np.testing.assert_allclose(row, np.array(wanted) * scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [4, 3], ids=["whole", "part"])
def test_each_pair_turns_by_its_angle_and_the_rest_stays(pairs, interleaved):
    random = np.random.default_rng(0)
    x, angles = random.standard_normal((2, 5, 3, 8)), random.uniform(-4, 4, (2, 5, pairs))
    # A pair is a complex number, and a rotation a product.
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, 2 * pairs)
    )  # fmt: skip
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, :, None]
    wanted = x.copy()
    wanted[..., first], wanted[..., second] = turned.real, turned.imag
    cos_sin = CosSin(jnp.cos(jnp.float32(angles)), jnp.sin(jnp.float32(angles)), interleaved)
    np.testing.assert_allclose(rotate(jnp.float32(x), cos_sin), wanted, rtol=0, atol=2e-6)


def test_scores_depend_on_the_distance_of_two_positions_alone():
    found = Rope(tuple(plain()))
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, HEAD_DIM))

    def score(query_at, key_at):
        turned = (
            rotate(x, found.cos_sin(jnp.array([[at]]), None)) for x, at in ((query, query_at), (key, key_at))
        )  # fmt: skip
        return float(jnp.vdot(*turned))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 6)) > 1e-2


def test_without_a_rope_nothing_rotates():
    x = jnp.ones((1, 2, 1, 4))
    assert rotate(x, None) is x
