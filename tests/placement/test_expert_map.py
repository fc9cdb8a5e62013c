"""Which rank holds which expert (spec 3.1, 3.4 and the values of 3.5)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.placement import build_routing_tables, determine_expert_map


def experts_of(ep_size, ep_rank, num_experts, strategy):
    """Global ids of a rank, in the order of their local indices, read off the map."""
    count, expert_map, _ = determine_expert_map(ep_size, ep_rank, num_experts, strategy)
    ids = [int(np.flatnonzero(expert_map == local)[0]) for local in range(count)]
    assert (expert_map >= 0).sum() == count
    return ids


@pytest.mark.parametrize(
    ("ep_size", "ep_rank", "num_experts", "count", "expected"),
    [
        (2, 0, 8, 4, [0, -1, 1, -1, 2, -1, 3, -1]),
        (2, 1, 8, 4, [-1, 0, -1, 1, -1, 2, -1, 3]),
        (2, 0, 9, 5, [0, -1, 1, -1, 2, -1, 3, -1, 4]),
        (2, 1, 9, 4, [-1, 0, -1, 1, -1, 2, -1, 3, -1]),
        (4, 0, 8, 2, [0, -1, -1, -1, 1, -1, -1, -1]),
        (4, 1, 8, 2, [-1, 0, -1, -1, -1, 1, -1, -1]),
        (4, 2, 8, 2, [-1, -1, 0, -1, -1, -1, 1, -1]),
        (4, 3, 8, 2, [-1, -1, -1, 0, -1, -1, -1, 1]),
    ],
)
def test_round_robin_maps_are_upstreams(ep_size, ep_rank, num_experts, count, expected):
    local, expert_map, mask = determine_expert_map(ep_size, ep_rank, num_experts, "round_robin")
    assert local == count
    assert expert_map.tolist() == expected
    assert expert_map.dtype == np.int32
    assert mask is None


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "strategy", "expected"),
    [
        (10, 4, "linear", [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]),
        (9, 2, "linear", [[0, 1, 2, 3, 4], [5, 6, 7, 8]]),
        (18, 4, "linear", [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17]]),
        (10, 4, "round_robin", [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]),
    ],
)
def test_the_first_ranks_take_the_remainder(num_experts, ep_size, strategy, expected):
    assert [experts_of(ep_size, rank, num_experts, strategy) for rank in range(ep_size)] == expected


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
@pytest.mark.parametrize(
    ("ep_size", "num_experts"), [(2, 4), (2, 8), (2, 9), (2, 16), (2, 17), (4, 8), (4, 16), (4, 18), (4, 32), (4, 33)]
)
def test_every_expert_is_local_on_exactly_one_rank(ep_size, num_experts, strategy):
    maps = [determine_expert_map(ep_size, rank, num_experts, strategy).expert_map for rank in range(ep_size)]
    np.testing.assert_array_equal((np.stack(maps) >= 0).sum(0), 1)


@settings(deadline=None)
@given(ep_size=st.integers(2, 40), num_experts=st.integers(1, 300), strategy=st.sampled_from(["linear", "round_robin"]))
def test_ranks_partition_the_experts_evenly(ep_size, num_experts, strategy):
    ranks = [experts_of(ep_size, rank, num_experts, strategy) for rank in range(ep_size)]
    assert sorted(expert for rank in ranks for expert in rank) == list(range(num_experts))
    counts = [len(rank) for rank in ranks]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
    for rank in ranks:
        steps = set(np.diff(rank).tolist())
        assert steps <= ({1} if strategy == "linear" else {ep_size})


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_one_rank_holds_everything_and_needs_no_map(strategy):
    assert determine_expert_map(1, 0, 7, strategy, 2, return_expert_mask=True) == (7, None, None)


def test_the_mask_covers_fused_shared_experts_and_ends_with_no_expert():
    local, expert_map, mask = determine_expert_map(2, 1, 5, "linear", 2, return_expert_mask=True)
    assert local == 2
    assert expert_map.tolist() == [-1, -1, -1, 0, 1, 2, 3]
    assert mask.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert (expert_map.dtype, mask.dtype) == (np.int32, np.int32)


def test_without_a_mask_the_map_covers_routed_experts_only():
    local, expert_map, mask = determine_expert_map(2, 1, 5, "linear", 2)
    assert (local, len(expert_map), mask) == (2, 5, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 8), "ep_size must be positive, got 0"),
        ((2, 2, 8), r"ep_rank must be in \[0, 2\), got 2"),
        ((2, 0, 0), "global_num_experts must be positive, got 0"),
        ((2, 0, 8, "random"), "placement strategy must be one of linear, round_robin; got 'random'"),
        ((2, 0, 8, "linear", -1), "num_fused_shared_experts must not be negative, got -1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        determine_expert_map(*arguments)


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "rank", "global_to_physical", "physical_to_global", "local_to_global"),
    [
        (8, 4, 1, [0, 2, 4, 6, 1, 3, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7], [1, 5]),
        (10, 4, 0, [0, 3, 6, 8, 1, 4, 7, 9, 2, 5], [0, 4, 8, 1, 5, 9, 2, 6, 3, 7], [0, 4, 8]),
        (9, 2, 0, [0, 5, 1, 6, 2, 7, 3, 8, 4], [0, 2, 4, 6, 8, 1, 3, 5, 7], [0, 2, 4, 6, 8]),
    ],
)
def test_routing_tables(num_experts, ep_size, rank, global_to_physical, physical_to_global, local_to_global):
    tables = build_routing_tables(ep_size, rank, num_experts)
    assert [table.tolist() for table in tables] == [global_to_physical, physical_to_global, local_to_global]
    assert {table.dtype for table in tables} == {np.dtype(np.int64)}


@settings(deadline=None)
@given(ep_size=st.integers(1, 40), num_experts=st.integers(1, 300))
def test_routing_tables_are_inverse_permutations_that_agree_with_the_expert_map(ep_size, num_experts):
    every = np.arange(num_experts)
    slots = []
    for rank in range(ep_size):
        tables = build_routing_tables(ep_size, rank, num_experts)
        np.testing.assert_array_equal(tables.physical_to_global[tables.global_to_physical], every)
        np.testing.assert_array_equal(tables.global_to_physical[tables.physical_to_global], every)
        if ep_size > 1:
            assert tables.local_to_global.tolist() == experts_of(ep_size, rank, num_experts, "round_robin")
        slots.extend(tables.local_to_global.tolist())
    assert slots == tables.physical_to_global.tolist(), "slots count through the ranks in order"
