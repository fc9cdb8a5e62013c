"""Order, positions and visibility of tokens with padding anywhere and any number of cached tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.sequence import NOWHERE, Sequence

IDS = jnp.zeros((2, 5), jnp.int32)
MASK = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_tokens_are_counted_from_the_first_real_one():
    sequence = Sequence.of(IDS, MASK)
    np.testing.assert_array_equal(sequence.order, [[NOWHERE, NOWHERE, 0, 1, 2], [0, 1, 2, NOWHERE, NOWHERE]])
    np.testing.assert_array_equal(sequence.positions, [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(sequence.new_tokens, [3, 3])


def test_counting_goes_on_after_cached_tokens():
    sequence = Sequence.of(IDS, MASK, lengths=jnp.array([4, 1]), cached_slots=8)
    np.testing.assert_array_equal(sequence.order[MASK == 1], [4, 5, 6, 1, 2, 3])


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("cached", [0, 3])
def test_a_token_sees_itself_and_earlier_real_ones_within_the_window(window, cached, rng):
    real = rng.integers(0, 2, size=(4, 6))
    real[0] = 1
    lengths = np.array([cached, 0, cached, cached])
    sequence = Sequence.of(
        jnp.zeros(real.shape, jnp.int32), jnp.asarray(real), lengths=jnp.asarray(lengths), cached_slots=10
    )
    visible = np.asarray(sequence.visibility(window).mask())[:, 0]
    for row in range(4):
        index = lengths[row]
        for token in range(6):
            if real[row, token]:
                first = 0 if window is None else max(0, index - window + 1)
                assert list(np.flatnonzero(visible[row, token])) == list(range(first, index + 1))
                index += 1


def test_without_a_cache_keys_are_the_new_tokens_and_padding_is_seen_by_no_one():
    visible = np.asarray(Sequence.of(IDS, MASK).visibility(2).mask())[:, 0]
    assert [list(np.flatnonzero(row)) for row in visible[0, 2:]] == [[2], [2, 3], [3, 4]]
    assert [list(np.flatnonzero(row)) for row in visible[1, :3]] == [[0], [0, 1], [1, 2]]


def test_a_mask_of_all_tokens_is_refused_when_only_new_ones_are_given():
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(2, 5\).*got \(2, 9\)"):
        Sequence.of(IDS, jnp.ones((2, 9)), lengths=jnp.array([4, 4]), cached_slots=9)
