"""Load balancing of experts: upstream's cases exactly, and what must hold for any load (spec 5)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.placement import (
    balanced_packing,
    compute_logical_maps,
    expected_physical_load,
    load_statistics,
    logical_load,
    preserve_resident_slots,
    rank_load,
    rebalance_experts,
    replicate_experts,
)

TENS = [10, 20, 30, 40]

# load, (replicas, groups, nodes, ranks) -> logical expert per slot, copies per expert (None: not published)
CASES = {
    "basic": (
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        (16, 4, 2, 8),
        [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]],
        [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]],
    ),
    "one rank": ([TENS], (4, 1, 1, 1), [[3, 2, 1, 0]], None),
    "equal loads": ([[50] * 8], (8, 2, 2, 4), [[0, 2, 1, 3, 4, 6, 5, 7]], None),
    "one hot expert": (
        [[1000] + [1] * 7],
        (12, 2, 2, 4),
        [[0, 0, 2, 0, 1, 3, 7, 5, 4, 6, 4, 5]],
        [[3, 1, 1, 1, 2, 2, 1, 1]],
    ),
    "three layers": (
        [[10, 20, 30, 40, 50, 60], [60, 50, 40, 30, 20, 10], [25] * 6],
        (8, 2, 2, 4),
        [[1, 0, 2, 2, 4, 5, 3, 5], [1, 0, 2, 0, 4, 5, 3, 3], [1, 0, 2, 0, 4, 3, 5, 3]],
        None,
    ),
    "groups not a multiple of nodes": ([TENS], (8, 3, 2, 4), [[2, 0, 2, 1, 3, 3, 3, 1]], [[1, 2, 2, 3]]),
    "small hierarchy": (
        [[100, 50, 200, 75, 150, 25, 300, 80]],
        (12, 4, 2, 4),
        [[6, 6, 7, 0, 6, 1, 2, 4, 4, 2, 3, 5]],
        [[1, 1, 2, 1, 2, 1, 3, 1]],
    ),
    "fallback to all ranks": (
        [[10, 20, 30, 40, 50, 60]],
        (8, 3, 2, 4),
        [[3, 0, 2, 4, 5, 4, 5, 1]],
        [[1, 1, 1, 1, 2, 2]],
    ),
    "two ranks": ([TENS], (6, 2, 1, 2), [[3, 3, 0, 1, 2, 2]], None),
    "sixteen experts": (
        [[50, 100, 75, 120, 90, 60, 80, 110, 40, 70, 95, 85, 65, 55, 45, 35]],
        (24, 8, 4, 8),
        [[3, 14, 15, 3, 2, 2, 9, 6, 8, 7, 7, 6, 12, 10, 11, 13, 10, 11, 5, 1, 4, 0, 1, 4]],
        None,
    ),
    "two layers, reversed": (
        [[200, 150, 100, 50, 25, 12], [12, 25, 50, 100, 150, 200]],
        (10, 3, 1, 2),
        [[1, 0, 0, 2, 5, 1, 0, 3, 2, 4], [4, 5, 5, 2, 0, 4, 5, 3, 3, 1]],
        [[3, 2, 2, 1, 1, 1], [1, 1, 1, 2, 2, 3]],
    ),
}


# Where different experts have equal load per copy, the order of those depends on the sort, upstream's on the machine.
TIES = ("one hot expert", "groups not a multiple of nodes", "small hierarchy", "two layers, reversed")


@pytest.mark.parametrize("case", [case for case in CASES if case not in TIES])
def test_published_placements_are_reproduced(case):
    load, sizes, expected, count = CASES[case]
    result = rebalance_experts(np.array(load), *sizes)
    np.testing.assert_array_equal(result.physical_to_logical, expected)
    if count is not None:
        np.testing.assert_array_equal(result.replica_count, count)


@pytest.mark.parametrize("case", TIES)
def test_published_placements_are_reproduced_up_to_experts_of_equal_load(case):
    load, sizes, expected, count = CASES[case]
    load, expected = np.array(load), np.array(expected)
    placement, _, replica_count = rebalance_experts(load, *sizes)
    np.testing.assert_array_equal(replica_count, count)
    # Slot for slot the same load: only which of the equal experts it is may differ.
    loads = [expected_physical_load(load, table, load.shape[1]) for table in (placement, expected)]
    np.testing.assert_allclose(loads[0], loads[1], rtol=1e-6)


# old placement, new placement, ranks -> new placement with residents in their slots
RESIDENTS = {
    "two ranks": ([0, 1, 2, 3, 4, 5, 6, 7], [1, 5, 0, 4, 6, 2, 7, 3], 2, [0, 1, 5, 4, 2, 3, 6, 7]),
    "copies": ([0, 1, 0, 2, 3, 4, 5, 6, 1, 2], [0, 5, 4, 0, 1, 6, 2, 3, 2, 1], 2, [0, 1, 0, 5, 4, 3, 2, 6, 1, 2]),
    "three ranks": ([0, 1, 2, 3] * 3, [0] * 8 + [1, 2, 3, 0], 3, [0] * 8 + [0, 1, 2, 3]),
}


@pytest.mark.parametrize("case", RESIDENTS)
def test_published_resident_slots_are_reproduced(case):
    old, new, num_ranks, expected = RESIDENTS[case]
    np.testing.assert_array_equal(preserve_resident_slots(np.array([new]), num_ranks, np.array([old])), [expected])


def test_published_logical_maps_are_reproduced():
    placement = np.array([[0, 1, -1, 2, 3, -1], [3, -1, 2, 1, 0, -1]])
    table, count = compute_logical_maps(placement, 4)
    np.testing.assert_array_equal(count, np.ones((2, 4)))
    np.testing.assert_array_equal(table[..., 0], [[0, 1, 3, 4], [4, 3, 2, 0]])
    assert (table[..., 1:] == -1).all()
    alone, alone_count = compute_logical_maps(placement[1], 4)
    np.testing.assert_array_equal(alone, table[1])
    np.testing.assert_array_equal(alone_count, count[1])


def test_published_load_statistics_are_reproduced():
    statistics = load_statistics(np.array([[100, 0, 0, 0], [100, 0, 0, 0]]))
    assert statistics == (50, 200, 0.25)
    assert load_statistics(np.zeros((2, 4))).balancedness == 1


def test_ranks_wait_for_the_busiest_of_every_layer():
    assert load_statistics(np.array([[100, 0], [0, 50]])) == (75, 150, 0.5)


def test_the_load_of_a_rank_is_that_of_its_slots():
    np.testing.assert_array_equal(rank_load(np.array([[1, 2, 3, 4, 5, 6]]), 3), [[3, 7, 11]])


def test_copies_add_up_to_the_load_of_their_expert_and_share_it_evenly(rng):
    placement = np.stack([rng.permutation([0, 1, 2, 3, 0, 2, 0]) for _ in range(2)])
    physical = rng.integers(100, size=placement.shape)
    logical = logical_load(physical, placement, 4)
    for layer in range(2):
        np.testing.assert_array_equal(logical[layer], [physical[layer][placement[layer] == e].sum() for e in range(4)])
    shared = expected_physical_load(logical, placement, 4)
    np.testing.assert_allclose(logical_load(shared, placement, 4), logical)
    assert len(np.unique(shared[0][placement[0] == 0].round(6))) == 1


def test_empty_slots_count_for_no_expert_and_get_no_load():
    placement = np.array([[0, -1, 1, 2], [2, 2, 1, 0]])
    logical = logical_load(np.array([[5, 100, 7, 9], [1, 2, 3, 4]]), placement, 3)
    np.testing.assert_array_equal(logical, [[5, 7, 9], [4, 3, 3]])
    np.testing.assert_array_equal(expected_physical_load(logical, placement, 3), [[5, 0, 7, 9], [1.5, 1.5, 3, 4]])


@pytest.mark.parametrize("expert", [3, -2])
def test_slots_with_experts_that_there_are_not_are_refused(expert):
    placement, message = np.array([[0, expert]]), rf"experts in \[0, 3\), or -1 for none; got {expert}"
    with pytest.raises(ValueError, match=message):
        logical_load(np.ones((1, 2)), placement, 3)
    with pytest.raises(ValueError, match=message):
        expected_physical_load(np.ones((1, 3)), placement, 3)


@st.composite
def loads_and_sizes(draw):
    """Loads of E experts and sizes (replicas, groups, nodes, ranks) that divide as they must."""
    nodes, ranks_per_node, groups_per_node, group_size = (draw(st.integers(1, 3)) for _ in range(4))
    groups, ranks = nodes * groups_per_node, nodes * ranks_per_node
    experts = groups * group_size
    slots_per_rank = -(-experts // ranks) + draw(st.integers(0, 3))
    load = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    layers = draw(st.lists(load, min_size=1, max_size=3))
    return np.array(layers, float), (slots_per_rank * ranks, groups, nodes, ranks)


@settings(deadline=None, max_examples=60)
@given(loads_and_sizes(), st.randoms(use_true_random=False))
def test_any_placement_holds_every_expert_and_keeps_residents_in_place(case, random):
    load, (replicas, groups, nodes, ranks) = case
    layers, experts = load.shape
    fresh = rebalance_experts(load, replicas, groups, nodes, ranks)
    for result in (fresh, _rebalanced_after(load, fresh, (replicas, groups, nodes, ranks), random)):
        placement, table, count = result
        assert placement.shape == (layers, replicas)
        assert ((placement >= 0) & (placement < experts)).all()
        assert (count >= 1).all()
        np.testing.assert_array_equal(count.sum(axis=1), replicas)
        for layer in range(layers):
            np.testing.assert_array_equal(count[layer], np.bincount(placement[layer], minlength=experts))
            for expert in range(experts):
                slots = table[layer, expert]
                assert slots[slots >= 0].tolist() == np.flatnonzero(placement[layer] == expert).tolist()
        if nodes > 1:  # experts of one group share a node
            node_of = np.arange(replicas) // (replicas // nodes)
            for layer in range(layers):
                for group in range(groups):
                    members = placement[layer] // (experts // groups) == group
                    assert len(set(node_of[members])) == 1


def _rebalanced_after(load, fresh, sizes, random):
    """The placement after another load, with residents; what each rank holds must be as without residents."""
    shuffled = load[:, random.sample(range(load.shape[1]), load.shape[1])]
    old, num_ranks = fresh.physical_to_logical, sizes[3]
    plain = rebalance_experts(shuffled, *sizes).physical_to_logical
    result = rebalance_experts(shuffled, *sizes, old_global_expert_indices=old)
    for layer in range(len(load)):
        per_rank = (array[layer].reshape(num_ranks, -1) for array in (old, plain, result.physical_to_logical))
        for before, asked, given_ in zip(*per_rank, strict=True):
            assert sorted(asked) == sorted(given_)
            for expert in set(before) & set(given_):
                stays = np.sum((before == expert) & (given_ == expert))
                assert stays == min(np.sum(before == expert), np.sum(given_ == expert))
    return result


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_packs_are_full_and_each_item_has_its_own_place(num_packs, capacity, data):
    items = num_packs * capacity
    weight = np.array([data.draw(st.lists(st.integers(0, 9), min_size=items, max_size=items)) for _ in range(2)], float)
    pack, place = balanced_packing(weight, num_packs)
    for layer in range(2):
        assert sorted(zip(pack[layer], place[layer], strict=True)) == [
            (p, i) for p in range(num_packs) for i in range(capacity)
        ]
        sums = np.bincount(pack[layer], weights=weight[layer], minlength=num_packs)
        if capacity > 1:  # greedy: no pack is heavier than the lightest by more than its heaviest item times its size
            assert sums.max() - sums.min() <= weight[layer].max() * capacity


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 8), st.data())
def test_no_expert_has_a_copy_that_another_needed_more(experts, extra, data):
    weight = np.array([data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))], float)
    expert, replica, count = replicate_experts(weight, experts + extra)
    assert count.sum() == experts + extra
    assert sorted(zip(expert[0], replica[0], strict=True)) == [
        (e, r) for e in range(experts) for r in range(count[0, e])
    ]
    for taker in np.flatnonzero(count[0] > 1):
        before = weight[0, taker] / (count[0, taker] - 1)  # its load per copy when it got the last one
        assert before >= (weight[0] / count[0]).max() - 1e-6


def test_four_layers_are_rebalanced_as_each_alone(rng):
    load = rng.integers(1, 1000, size=(4, 32))
    together = rebalance_experts(load, 40, 4, 2, 8).physical_to_logical
    for layer in range(4):
        alone = rebalance_experts(load[layer : layer + 1], 40, 4, 2, 8).physical_to_logical
        np.testing.assert_array_equal(together[layer], alone[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((7, 1, 1, 4), "num_replicas must be a multiple of num_ranks=4, got 7"),
        ((8, 3, 1, 4), "the number of experts must be a multiple of num_groups=3, got 4"),
        ((8, 2, 2, 3), "num_ranks must be a multiple of num_nodes=2, got 3"),
        ((2, 1, 1, 2), "num_replicas must be at least the number of experts, 4, got 2"),
        ((4, 0, 1, 2), "must be positive, got num_groups=0"),
        ((4, 1, 0, 2), "must be positive, .* num_nodes=0"),
        ((4, 1, 1, 0), "must be positive, .* num_ranks=0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(np.array([TENS]), *sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rebalance_experts(np.array(TENS), 4, 1, 1, 2), r"weight must have the shape \(layers, experts\)"),
        (lambda: balanced_packing(np.ones((1, 5)), 2), "number of packs must divide the 5 items, got 2"),
        (lambda: replicate_experts(np.ones((1, 5)), 4), "at least the number of experts, 5, got 4"),
        (lambda: rank_load(np.ones((1, 5)), 2), "number of ranks must divide the 5 physical slots, got 2"),
        (lambda: rank_load(np.ones((1, 5)), 0), "number of ranks must divide the 5 physical slots, got 0"),
        (lambda: compute_logical_maps(np.array([0, 2, 2]), 4), r"got none for \[1, 3\]"),
        (lambda: compute_logical_maps(np.array([0, 1, 2]), 2), r"a logical expert in \[0, 2\), or -1 for none; got 2"),
        (lambda: compute_logical_maps(np.array([0, 1, -2]), 2), r"a logical expert in \[0, 2\), or -1 .*; got -2"),
        (
            lambda: preserve_resident_slots(np.zeros((1, 4)), 2, np.zeros((1, 5))),
            r"the new one's shape \(1, 4\), got \(1, 5\)",
        ),
        (lambda: preserve_resident_slots(np.zeros((1, 4)), 3, np.zeros((1, 4))), "divide the 4 physical slots, got 3"),
        (lambda: preserve_resident_slots(np.zeros((1, 4)), 0, np.zeros((1, 4))), "divide the 4 physical slots, got 0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
