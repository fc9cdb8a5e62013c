"""Values rounded to another dtype in their own."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.kernels.rounding import rounded_to

SPECIAL = np.float32(
    [0, -0.0, 2e-8, 3e-8, -1e-5, 6.09e-5, 6.1034e-5, 6.11e-5, 0.25, 0.3333, 7e4, np.inf, -np.inf, np.nan]
)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda dtype: dtype.__name__)
def test_values_are_those_of_a_cast_there_and_back_also_under_jit(dtype, rng):
    values = np.concatenate([SPECIAL, np.float32(rng.normal(size=500) * 10.0 ** rng.uniform(-9, 5, size=500))])
    with np.errstate(over="ignore"):
        expected = values.astype(dtype).astype(np.float32)
    rounded = jax.jit(rounded_to, static_argnums=1)(values, dtype)
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_derivatives_are_not_rounded(dtype):
    slopes = jnp.linspace(0.1, 0.9, SPECIAL.size)
    _, pull_back = jax.vjp(lambda values: rounded_to(values, dtype), jnp.array(SPECIAL))
    np.testing.assert_array_equal(pull_back(slopes)[0], slopes)
    _, pushed = jax.jvp(lambda values: rounded_to(values, dtype), (jnp.array(SPECIAL),), (slopes,))
    np.testing.assert_array_equal(pushed, slopes)
