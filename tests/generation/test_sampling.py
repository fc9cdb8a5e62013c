"""Sampling against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.generation import greedy, in_nucleus, penalize_repetition, sample

ROWS, VOCAB, DRAWS = 2, 12, 4000


@pytest.fixture
def logits(rng):
    return (2 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)


def expected_distribution(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of one row after temperature, top-k and top-p, float64, ties to the lowest id."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")[:top_k]
    probabilities = np.exp(logits[order] - logits[order].max())
    probabilities /= probabilities.sum()
    if top_p is not None:
        size = next(n for n in range(1, len(order) + 1) if probabilities[:n].sum() >= top_p or n == len(order))
        order, probabilities = order[:size], probabilities[:size] / probabilities[:size].sum()
    result = np.zeros(len(logits))
    result[order] = probabilities
    return result


def draw(logits, seed, draws=DRAWS, **options):
    """Frequencies [ROWS, VOCAB] of many draws per row."""
    keys = jax.random.split(jax.random.key(seed), draws * len(logits))
    tokens = np.asarray(sample(jnp.repeat(jnp.asarray(logits), draws, axis=0), keys, **options)).reshape(-1, draws)
    assert tokens.dtype == np.int32
    return np.stack([np.bincount(row, minlength=logits.shape[1]) for row in tokens]) / draws


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 3.0, "top_k": 5},
        {"top_k": 100},
        {"top_p": 0.75},
        {"temperature": 2.0, "top_k": 7, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_restricted_distribution(logits, rng, options):
    frequencies = draw(logits, int(rng.integers(2**31)), **options)
    for row in range(ROWS):
        expected = expected_distribution(logits[row], **options)
        assert not frequencies[row][expected == 0].any()
        deviation = np.sqrt(expected * (1 - expected) / DRAWS)
        assert (np.abs(frequencies[row] - expected) <= 6 * deviation + 1 / DRAWS).all()


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_a_penalty_moves_tokens_on_either_side_of_zero_the_same_way_and_in_float32(logits, rng, penalty):
    logits = jnp.asarray(logits, jnp.bfloat16)
    seen = rng.random((ROWS, VOCAB)) < 0.5
    penalized = penalize_repetition(logits, jnp.asarray(seen), penalty)
    assert penalized.dtype == jnp.float32
    expected = np.asarray(logits, np.float64)
    for row, token in np.argwhere(seen):
        expected[row, token] *= 1 / penalty if expected[row, token] > 0 else penalty
    np.testing.assert_allclose(penalized, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.5, 1), (0.5001, 2), (0.75, 2), (0.7501, 3), (0.875, 3), (0.88, 4), (1e-6, 1), (1e-60, 1), (1.0, 4)],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(top_p, kept):
    ranked = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    assert np.asarray(in_nucleus(ranked, top_p)).tolist() == [[True] * kept + [False] * (4 - kept)]


def test_the_nucleus_of_a_long_tail_is_that_of_float64(rng):
    ranked = -np.sort(-3 * rng.standard_normal((4, 5000)).astype(np.float32), axis=-1)
    probabilities = np.exp(ranked.astype(np.float64))
    reached = np.cumsum(probabilities / probabilities.sum(-1, keepdims=True), axis=-1)
    sizes = np.asarray(in_nucleus(jnp.asarray(ranked), 0.9)).sum(-1)
    # Rounding may move the border only between sets that reach p to float32's accuracy.
    for row, size in enumerate(sizes):
        assert reached[row, size - 1] >= 0.9 - 1e-5
        assert size == 1 or reached[row, size - 2] <= 0.9 + 1e-5


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_ties_go_to_the_lowest_ids(options, rng):
    logits = np.zeros((1, 6), np.float32)  # of six equal tokens, both restrictions leave three
    frequencies = draw(logits, int(rng.integers(2**31)), draws=300, **options)
    assert (frequencies[0, :3] > 0).all()
    assert not frequencies[0, 3:].any()


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-40, 1e-60])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_lowest_temperatures_draw_the_most_likely_token(logits, rng, temperature, options):
    logits = 30 * logits + 100  # divided by the temperature, all of them are infinite
    frequencies = draw(logits, int(rng.integers(2**31)), draws=50, temperature=temperature, **options)
    np.testing.assert_array_equal(frequencies.argmax(-1), logits.argmax(-1))
    np.testing.assert_array_equal(frequencies.max(-1), 1)


@pytest.mark.parametrize("options", [{"temperature": 0.3}, {"temperature": 0.3, "top_k": 400, "top_p": 0.9}], ids=str)
def test_narrower_logits_are_computed_with_in_float32(rng, options):
    narrow = jnp.asarray(2 * rng.standard_normal((64, 500)), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 64)
    np.testing.assert_array_equal(sample(narrow, keys, **options), sample(narrow.astype(jnp.float32), keys, **options))
    ranked = -jnp.sort(-narrow)
    np.testing.assert_array_equal(in_nucleus(ranked, 0.9), in_nucleus(ranked.astype(jnp.float32), 0.9))


def test_tokens_of_logit_minus_infinity_are_never_drawn(rng):
    logits = np.array([[-np.inf, 0.0, -np.inf, 1.0]], np.float32)
    for options in ({}, {"top_p": 1.0}, {"top_k": 4}):
        assert not draw(logits, int(rng.integers(2**31)), draws=300, **options)[0, [0, 2]].any()


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]], jnp.bfloat16)
    tokens = greedy(logits)
    assert tokens.tolist() == [1, 0]
    assert tokens.dtype == jnp.int32
