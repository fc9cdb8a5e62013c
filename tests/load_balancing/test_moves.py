"""Which slot an expert comes from when the placement changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.load_balancing.moves import plan_moves


@st.composite
def placements(draw):
    """Two placements of the same experts, `[L, P]` each, and the number of ranks."""
    ranks, slots, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    num_slots = max(ranks * slots, -(-experts // ranks) * ranks)

    def layer():
        extra = draw(st.lists(st.integers(0, experts - 1), min_size=num_slots - experts, max_size=num_slots - experts))
        return draw(st.permutations([*range(experts), *extra]))

    layers = draw(st.integers(1, 3))
    return np.array([layer() for _ in range(layers)]), np.array([layer() for _ in range(layers)]), ranks


@settings(deadline=None, max_examples=80)
@given(placements())
def test_every_slot_gets_its_expert_from_as_near_as_possible(case):
    old, new, ranks = case
    moves = plan_moves(old, new, ranks)
    rank_of = np.arange(old.shape[1]) // (old.shape[1] // ranks)
    sent = copied = 0
    for layer in range(len(old)):
        source = moves.source[layer]
        np.testing.assert_array_equal(old[layer][source], new[layer])
        for slot in range(old.shape[1]):
            if old[layer, slot] == new[layer, slot]:
                assert source[slot] == slot
            elif new[layer, slot] in old[layer][rank_of == rank_of[slot]]:
                assert rank_of[source[slot]] == rank_of[slot]
                copied += 1
            else:
                sent += 1
    assert (moves.sent, moves.copied) == (sent, copied)


def test_ranks_that_hold_copies_take_turns_in_sending():
    old = np.array([[0, 1, 0, 2, 3, 4, 5, 6]])  # expert 0 on ranks 0 and 1
    new = np.array([[0, 1, 0, 2, 0, 4, 0, 6]])  # and now on all four
    moves = plan_moves(old, np.concatenate([new]), 4)
    assert sorted(moves.source[0][[4, 6]]) == [0, 2]


@pytest.mark.parametrize(
    ("old", "new", "ranks", "message"),
    [
        ([[0, 1]], [[0, 1, 1]], 1, r"the old one's shape \(1, 2\), got \(1, 3\)"),
        ([[0, 1, 1]], [[0, 1, 0]], 2, "divide the 3 physical slots, got 2"),
        ([[0, 1, 1]], [[0, 1, 0]], 0, "divide the 3 physical slots, got 0"),
        ([[0, 0]], [[0, 1]], 2, "no slot held expert 1 of layer 0 before"),
    ],
)
def test_placements_that_cannot_follow_each_other_are_refused(old, new, ranks, message):
    with pytest.raises(ValueError, match=message):
        plan_moves(np.array(old), np.array(new), ranks)
