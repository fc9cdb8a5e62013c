"""Rotary embedding against its definition in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.families.decoder import LinearScaling, Rope, YarnScaling
from moe_jax.models.rotary import inverse_frequencies, rotate, rotation

PLAIN = Rope(theta=10000.0, rotary_dim=8)


def rotate_by_definition(x, rope, positions, frequencies, factor):
    """Each pair as a complex number, turned; interleaved pairs come out as two halves."""
    result = x.astype(np.float64).copy()
    half = rope.rotary_dim // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        turned = (x[..., a] + 1j * x[..., b]) * factor * np.exp(1j * positions * frequencies[i])[:, :, None]
        result[..., i], result[..., i + half] = turned.real, turned.imag
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 12])
def test_pairs_are_rotated_by_their_angle_and_the_rest_passes(interleaved, rotary_dim, rng):
    rope = Rope(theta=100.0, rotary_dim=rotary_dim, interleaved=interleaved)
    x = rng.normal(size=(2, 5, 3, 12)).astype(np.float32)
    positions = rng.integers(0, 50, size=(2, 5))
    actual = rotate(jnp.asarray(x), rope, rotation(rope, jnp.asarray(positions)))
    frequencies = 100.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    np.testing.assert_allclose(actual, rotate_by_definition(x, rope, positions, frequencies, 1.0), atol=2e-5)
    np.testing.assert_array_equal(actual[..., rotary_dim:], x[..., rotary_dim:])


def test_query_key_products_depend_on_the_distance_alone(rng):
    query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    products = []
    for start in (0, 17):
        turned = [
            rotate(jnp.asarray(x), PLAIN, rotation(PLAIN, jnp.array([[p]])))
            for x, p in ((query, start + 5), (key, start + 2))
        ]
        products.append(float(jnp.sum(turned[0] * turned[1])))
    assert products[0] == pytest.approx(products[1], rel=1e-4, abs=1e-4)


def test_linear_scaling_divides_the_positions():
    stretched = Rope(theta=10000.0, rotary_dim=8, scaling=LinearScaling(factor=4.0))
    np.testing.assert_allclose(inverse_frequencies(stretched), inverse_frequencies(PLAIN) / 4, rtol=1e-6)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_frequencies_interpolates_slow_ones_and_blends_between(truncate):
    """By the formulas of the paper: turns over the original length decide, linearly in the dimension."""
    theta, dim, factor, length, fast, slow = 150000.0, 64, 32.0, 4096, 32.0, 1.0
    yarn = YarnScaling(factor=factor, original_max_positions=length, truncate=truncate, attention_factor=1.25)
    actual = inverse_frequencies(Rope(theta=theta, rotary_dim=dim, scaling=yarn))

    plain = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    borders = [dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)]
    low, high = (math.floor(borders[0]), math.ceil(borders[1])) if truncate else borders
    blend = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(actual, plain * (1 - blend) + plain / factor * blend, rtol=1e-5)
    assert actual[0] == np.float32(plain[0])
    np.testing.assert_allclose(actual[-1], plain[-1] / factor, rtol=1e-6)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("theta", "dim", "length", "fast", "slow"),
    [
        (10000.0, 32, 64, 32.0, 1.0),  # no pair turns 32 times: the ramp begins at the first one
        (10.0, 16, 4096, 32.0, 1.0),  # every pair turns more than once: it ends at the last dimension
        (10000.0, 32, 4096, 4.0, 4.0),  # there is hardly a ramp
    ],
)
def test_the_ramp_of_yarn_stays_within_the_dimensions(theta, dim, length, fast, slow, truncate):
    """As in Hugging Face's `_compute_yarn_parameters`, whose dimensions are twice as many as pairs."""
    yarn = YarnScaling(factor=8.0, original_max_positions=length, beta_fast=fast, beta_slow=slow, truncate=truncate)
    actual = inverse_frequencies(Rope(theta=theta, rotary_dim=dim, scaling=yarn))
    low, high = (dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    plain = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    blend = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(actual, plain * (1 - blend) + plain / 8 * blend, rtol=1e-5)


def test_positions_far_into_a_long_text_are_exact(rng):
    positions = rng.integers(100_000, 1_000_000, (2, 5))
    turn = rotation(PLAIN, jnp.asarray(positions))
    angles = positions[..., None] * np.array([1.0, 0.1, 0.01, 0.001])
    # A float32 product is off by a relative 2^-24, and so is each frequency.
    np.testing.assert_allclose(turn.cos, np.cos(angles), atol=0.2)
    np.testing.assert_allclose(turn.cos[..., 2:], np.cos(angles[..., 2:]), atol=2e-3)
    np.testing.assert_allclose(turn.sin[..., 2:], np.sin(angles[..., 2:]), atol=2e-3)


def test_the_attention_factor_multiplies_cosine_and_sine():
    yarn = YarnScaling(factor=4.0, original_max_positions=64, attention_factor=1.25)
    turn = rotation(Rope(theta=100.0, rotary_dim=8, scaling=yarn), jnp.array([[0, 3]]))
    np.testing.assert_allclose(turn.cos**2 + turn.sin**2, np.full((1, 2, 4), 1.25**2), rtol=1e-6)
    assert turn.cos.dtype == jnp.float32
