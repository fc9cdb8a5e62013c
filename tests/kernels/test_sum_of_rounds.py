"""A sum of as many terms as turn out to be there, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels.sum_of_rounds import sum_of_rounds


def scaled_cosine(number, constants, variables):
    return jnp.cos(variables["x"] * number) * constants


def test_a_sum_of_rounds_and_its_gradient_are_those_of_the_terms_one_by_one(rng):
    x, direction = rng.normal(size=(2, 5)).astype(np.float32)
    factor = jnp.float32(1.5)
    for num_rounds in (0, 1, 2, 5):
        total, pull_back = jax.jit(
            lambda x, num_rounds: jax.vjp(lambda x: sum_of_rounds(scaled_cosine, num_rounds, factor, {"x": x}, x**2), x)
        )(x, num_rounds)
        numbers = np.arange(1, num_rounds)[:, None]
        np.testing.assert_allclose(total, x**2 + 1.5 * np.cos(x * numbers).sum(axis=0), rtol=1e-5, atol=1e-5)
        gradient = (2 * x - (1.5 * numbers * np.sin(x * numbers)).sum(axis=0)) * direction
        np.testing.assert_allclose(pull_back(jnp.asarray(direction))[0], gradient, rtol=1e-5, atol=1e-5)


def itself(number, constants, variables):
    del number, constants
    return variables


def test_a_gradient_over_many_rounds_is_rounded_once():
    ones = jnp.ones(3, jnp.bfloat16)
    _, pull_back = jax.vjp(lambda x: sum_of_rounds(itself, jnp.int32(1000), (), x, x), ones)
    (gradient,) = pull_back(ones)
    assert gradient.dtype == jnp.bfloat16
    assert gradient.tolist() == [float(jnp.bfloat16(1000))] * 3
