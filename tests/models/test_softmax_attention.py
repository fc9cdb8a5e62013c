"""Softmax attention with sinks, grouped heads and unequal widths, at once and in blocks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models import softmax_attention
from moe_jax.models.sequence import NOWHERE, Visibility
from moe_jax.models.softmax_attention import attend, attend_in_blocks


def attend_by_definition(query, key, value, mask, scale, sinks):
    """float64, one head at a time; `sinks` [N] are extra logits whose probability is thrown away."""
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    outputs = []
    for head in range(heads):
        logits = np.einsum("bsd,btd->bst", query[:, :, head], key[:, :, head // group]) * scale
        logits = np.where(mask[:, 0], logits, -np.inf)
        sink = np.full((*logits.shape[:2], 1), -np.inf if sinks is None else sinks[head])
        weights = np.concatenate([logits, sink], -1)
        weights = np.exp(weights - weights.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
        outputs.append(np.einsum("bst,btv->bsv", weights, value[:, :, head // group]))
    return np.stack(outputs, axis=2)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_width", [4, 6, 9])
def test_attention_is_a_softmax_over_visible_keys_and_the_sink(with_sinks, value_width, rng):
    query, key = rng.normal(size=(2, 5, 6, 6)), rng.normal(size=(2, 7, 3, 6))
    value = rng.normal(size=(2, 7, 3, value_width))
    mask = rng.random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    sinks = rng.normal(size=6) * 3 if with_sinks else None
    as_jax = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    actual = attend(as_jax(query), as_jax(key), as_jax(value), jnp.asarray(mask), scale=0.7, sinks=as_jax(sinks))
    np.testing.assert_allclose(actual, attend_by_definition(query, key, value, mask, 0.7, sinks), atol=5e-6)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_scores_are_float32_and_may_be_large(with_sinks, rng):
    """Far apart, so that exponentials of them would overflow, and known more exactly than bfloat16 numbers of their size."""
    as_jax = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    query, key, value = (as_jax(rng.normal(size=(2, 5, heads, 8))) for heads in (6, 3, 3))
    sinks = as_jax(rng.normal(size=6) * 100) if with_sinks else None
    mask = jnp.ones((2, 1, 5, 5), bool)
    actual = attend(query, key, value, mask, scale=50.0, sinks=sinks)
    exact = [None if x is None else np.asarray(x, np.float64) for x in (query, key, value, sinks)]
    expected = attend_by_definition(*exact[:3], np.asarray(mask), 50.0, exact[3])
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=0.03)
    assert actual.dtype == jnp.bfloat16


@pytest.mark.parametrize("with_sinks", [False, True])
def test_large_scores_that_differ_little_are_told_apart(with_sinks, rng):
    """All about 256, where bfloat16 numbers are 2 apart, so that rounded scores would be other probabilities."""
    query, key, value = (rng.normal(size=(2, 5, heads, 8)) for heads in (6, 3, 3))
    query[..., 0] = key[..., 0] = 16
    sinks = np.full(6, 256.0) if with_sinks else None
    query, key, value, sinks = (None if x is None else jnp.asarray(x, jnp.bfloat16) for x in (query, key, value, sinks))
    mask = jnp.ones((2, 1, 5, 5), bool)
    actual = attend(query, key, value, mask, scale=1.0, sinks=sinks)
    exact = [None if x is None else np.asarray(x, np.float64) for x in (query, key, value, sinks)]
    expected = attend_by_definition(*exact[:3], np.asarray(mask), 1.0, exact[3])
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=0.03)


def test_a_token_that_sees_nothing_gets_numbers_not_nan(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.float32)
    for sinks in (None, jnp.zeros(2)):
        assert np.isfinite(attend(x, x, x, jnp.zeros((1, 1, 3, 3), bool), scale=1.0, sinks=sinks)).all()


def test_a_sink_far_above_all_scores_takes_everything_and_leaves_finite_gradients(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.float32)

    def output(x, sinks):
        return attend(x, x, x, jnp.ones((1, 1, 3, 3), bool), scale=1.0, sinks=sinks)

    sinks = jnp.array([200.0, 300.0])
    np.testing.assert_allclose(output(x, sinks), 0, atol=1e-30)
    for gradient in jax.grad(lambda x, sinks: output(x, sinks).sum(), argnums=(0, 1))(x, sinks):
        np.testing.assert_allclose(gradient, 0, atol=1e-30)


def draw(rng, *, queries=37, keys=43, value_width=6, with_sinks=False):
    """Float64 query, key, value of two rows, 6 and 3 heads; sinks or None."""
    query, key = rng.normal(size=(2, queries, 6, 6)), rng.normal(size=(2, keys, 3, 6))
    return query, key, rng.normal(size=(2, keys, 3, value_width)), rng.normal(size=6) * 3 if with_sinks else None


def draw_places(rng, *, queries=37, keys=43, window=None):
    """Tokens at random places, a few of them padding, before a cache of `keys` slots."""
    places = np.sort(rng.integers(0, keys, size=(2, queries)), axis=1).astype(np.int32)
    places[1, -3:] = NOWHERE
    return Visibility(jnp.asarray(places), jnp.arange(keys, dtype=jnp.int32)[None], window)


@pytest.fixture
def blocks_of_5(monkeypatch):
    monkeypatch.setattr(softmax_attention, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(softmax_attention, "FEWEST_QUERIES", 5)


def as_float32(*arrays):
    return [None if array is None else jnp.asarray(array, jnp.float32) for array in arrays]


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("value_width", [6, 9])
def test_in_blocks_every_token_gets_what_the_definition_gives(blocks_of_5, with_sinks, window, value_width, rng):
    *arrays, sinks = draw(rng, value_width=value_width, with_sinks=with_sinks)
    visibility = draw_places(rng, window=window)
    query, key, value, sinks_32 = as_float32(*arrays, sinks)
    compute = jax.jit(lambda query: attend_in_blocks(query, key, value, visibility, scale=0.7, sinks=sinks_32))
    with np.errstate(invalid="ignore"):  # padding may see nothing
        expected = attend_by_definition(*arrays, np.asarray(visibility.mask()), 0.7, sinks)
    real = np.asarray(visibility.queries) != NOWHERE
    np.testing.assert_allclose(np.asarray(compute(query))[real], expected[real], atol=5e-6)


@pytest.mark.parametrize("with_sinks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_in_blocks_and_at_once_are_those_of_finite_differences(with_sinks, rng, monkeypatch):
    *arrays, sinks = draw(rng, with_sinks=with_sinks)
    visibility, weights = draw_places(rng), rng.normal(size=arrays[0].shape)
    weights[1, -3:] = 0  # padding
    inputs = [array for array in (*arrays, sinks) if array is not None]
    directions = [rng.normal(size=array.shape) for array in inputs]

    def by_definition(step):
        moved = [array + step * direction for array, direction in zip(inputs, directions, strict=True)]
        query, key, value, sinks = (*moved, None)[:4]
        return (attend_by_definition(query, key, value, np.asarray(visibility.mask()), 0.7, sinks) * weights).sum()

    expected = (by_definition(1e-6) - by_definition(-1e-6)) / 2e-6

    def slope():
        def loss(inputs):
            query, key, value, sinks = (*inputs, None)[:4]
            return (attend_in_blocks(query, key, value, visibility, scale=0.7, sinks=sinks) * weights).sum()

        return jax.jvp(loss, (as_float32(*inputs),), (as_float32(*directions),))[1], jax.grad(loss)(as_float32(*inputs))

    for queries_at_once in (100, 5):
        monkeypatch.setattr(softmax_attention, "SCORES_AT_ONCE", 1)
        monkeypatch.setattr(softmax_attention, "FEWEST_QUERIES", queries_at_once)
        forward, gradients = slope()
        backward = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose([forward, backward], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_memory_grows_with_the_length_of_a_prompt_and_not_with_its_square(with_gradient, with_sinks):
    def temporaries(length):
        arrays = [jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (16, 4, 4)]
        places = jax.ShapeDtypeStruct((1, length), jnp.int32)
        sinks = jnp.zeros(16) if with_sinks else None

        def compute(query, key, value, places):
            visibility = Visibility(places, places, None)
            return attend_in_blocks(query, key, value, visibility, scale=0.25, sinks=sinks).sum()

        if with_gradient:
            compute = jax.grad(compute, argnums=(0, 1, 2))
        return jax.jit(compute).lower(*arrays, places).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 4.5 * short  # 16 times, if it were the square


@pytest.mark.parametrize(("batch", "blocks"), [(1, 1), (64, 2)])
def test_short_sequences_need_no_loop_unless_there_are_many(batch, blocks):
    query = jax.ShapeDtypeStruct((batch, 256, 32, 64), jnp.float32)
    places = jnp.arange(256)[None].repeat(batch, 0)
    jaxpr = jax.make_jaxpr(lambda x: attend_in_blocks(x, x, x, Visibility(places, places, None), scale=1.0))(query)
    loops = [equation.params["length"] for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert loops == ([] if blocks == 1 else [blocks])
