"""Rows of pairs of a token and a choice: gathered, summed, and their gradients, against loops over pairs in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.aot.jaxprs import equations
from moe_jax.kernels.pair_rows import PairRows
from moe_jax.kernels.sum_of_choices import sum_of_choices

TOKENS, TOP_K, HIDDEN = 7, 3, 5
MASKED = pytest.mark.parametrize("masked", [False, True])


def draw_rows(rng, masked):
    """Rows in any order; with masks more rows than pairs, and pairs without a row."""
    num_pairs = TOKENS * TOP_K
    num_rows = num_pairs + 4 if masked else num_pairs
    position = rng.permutation(num_rows)[:num_pairs]
    pair = rng.integers(0, num_pairs, size=num_rows)
    pair[position] = np.arange(num_pairs)
    if not masked:
        return PairRows(jnp.array(pair), jnp.array(position.reshape(TOKENS, TOP_K)))
    has_row = rng.random(num_pairs) < 0.6
    is_row = np.isin(np.arange(num_rows), position[has_row])
    shape = (TOKENS, TOP_K)
    return PairRows(*map(jnp.array, (pair, position.reshape(shape), is_row, has_row.reshape(shape))))


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def pairs_of(rows):
    """Token, choice and row of every pair that has one."""
    has_row = np.ones(rows.position.shape, bool) if rows.has_row is None else np.asarray(rows.has_row)
    return [(token, choice, int(rows.position[token, choice])) for token, choice in np.argwhere(has_row)]


def with_nan_elsewhere(rows, results):
    """NaN in rows that are no pair's."""
    legal = [row for _, _, row in pairs_of(rows)]
    spoilt = np.full_like(results, np.nan)
    spoilt[legal] = results[legal]
    return spoilt


@MASKED
def test_results_are_summed_in_the_order_of_choices_and_others_are_not_looked_at(masked, rng):
    rows = draw_rows(rng, masked)
    results = with_nan_elsewhere(rows, draw(rng, rows.pair.shape[0], HIDDEN))
    weights = draw(rng, TOKENS, TOP_K)
    expected, unweighted = np.zeros((2, TOKENS, HIDDEN), np.float32)
    for token, choice, row in pairs_of(rows):
        expected[token] += weights[token, choice] * results[row]
        unweighted[token] += results[row]
    if masked:
        weights = np.where(rows.has_row, weights, np.nan)
    with jax.disable_jit():  # compiled, a product and a sum may be rounded once
        np.testing.assert_array_equal(rows.combine(jnp.array(results), jnp.array(weights)), expected)
    total = sum_of_choices(jnp.array(results), rows.position, counts=rows.has_row)
    np.testing.assert_array_equal(total, unweighted)


def test_few_bits_are_summed_in_the_dtype_that_is_asked_for(rng):
    rows = draw_rows(rng, masked=False)
    results = jnp.array(draw(rng, TOKENS * TOP_K, HIDDEN), jnp.bfloat16)
    total = sum_of_choices(results, rows.position, dtype=jnp.float32)
    assert total.dtype == jnp.float32
    expected = np.asarray(results, np.float64)[np.asarray(rows.position)].sum(axis=1)
    np.testing.assert_allclose(total, expected, rtol=1e-6, atol=1e-6)


@MASKED
def test_gradients_are_those_of_the_pairs(masked, rng):
    rows = draw_rows(rng, masked)
    x, weights, cotangent = draw(rng, TOKENS, HIDDEN), draw(rng, TOKENS, TOP_K), draw(rng, TOKENS, HIDDEN)
    results = with_nan_elsewhere(rows, draw(rng, rows.pair.shape[0], HIDDEN))
    row_cotangent = with_nan_elsewhere(rows, draw(rng, rows.pair.shape[0], HIDDEN))
    x_gradient, results_gradient = np.zeros(x.shape), np.zeros(results.shape)
    weights_gradient = np.zeros(weights.shape)
    for token, choice, row in pairs_of(rows):
        x_gradient[token] += row_cotangent[row]
        results_gradient[row] += weights[token, choice] * cotangent[token]
        weights_gradient[token, choice] = cotangent[token].astype(np.float64) @ results[row]

    _, pull_back = jax.vjp(rows.gather, jnp.array(x))
    np.testing.assert_allclose(pull_back(jnp.array(row_cotangent))[0], x_gradient, rtol=1e-5, atol=1e-5)
    _, pull_back = jax.vjp(rows.combine, jnp.array(results), jnp.array(weights))
    for actual, expected in zip(pull_back(jnp.array(cotangent)), (results_gradient, weights_gradient), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@MASKED
def test_nothing_is_scattered_in_either_direction(masked, rng):
    rows = draw_rows(rng, masked)

    def there_and_back(x, weights):
        return jnp.sum(rows.combine(rows.gather(x) ** 2, weights))

    program = jax.make_jaxpr(jax.grad(there_and_back, argnums=(0, 1)))(
        draw(rng, TOKENS, HIDDEN), draw(rng, TOKENS, TOP_K)
    )
    names = {equation.primitive.name for equation in equations(program.jaxpr)}
    assert "gather" in names
    assert not any(name.startswith("scatter") for name in names)
