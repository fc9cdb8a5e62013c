"""`ExpertMapManager`: immutable, every table rebuilt on every update (spec 3.3 and 3.6; PR #41046)."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.placement import ExpertMapManager, ParallelRanks


def ep_ranks(ep_size, ep_rank=0, *, dp=False):
    """`ep_size` expert-parallel ranks, as tensor-parallel or data-parallel ones."""
    if dp:
        return ParallelRanks.from_vllm(1, ep_size, True, dp_rank=ep_rank)
    return ParallelRanks.from_vllm(ep_size, 1, True, tp_rank=ep_rank)


ALONE = ParallelRanks()


def make(num_experts=8, ranks=ALONE, **kwargs):
    return ExpertMapManager(global_num_experts=num_experts, ranks=ranks, **kwargs)


def test_one_rank_holds_every_expert():
    manager = make()
    assert (manager.expert_map, manager.expert_mask, manager.routing_tables) == (None, None, None)
    assert manager.local_num_experts == 8
    assert manager.get_local_expert_ids() == list(range(8))
    assert manager.map_global_to_local(5) == 5
    assert manager.is_local_expert(5)
    assert manager.get_compressed_map_string() == "[0..7]"


def test_a_rank_knows_its_experts():
    manager = make(8, ep_ranks(4, 1), placement_strategy="round_robin", num_expert_group=2)
    assert manager.get_local_expert_ids() == [1, 5]
    assert manager.get_compressed_map_string() == "0->1, 1->5"
    assert [manager.map_global_to_local(e) for e in range(8)] == [-1, 0, -1, -1, -1, 1, -1, -1]
    assert [e for e in range(8) if manager.is_local_expert(e)] == [1, 5]


@pytest.mark.parametrize("expert", [-1, 8])
def test_ids_of_no_expert_are_refused_and_never_wrap_around(expert):
    for manager in (make(), make(8, ep_ranks(2))):
        with pytest.raises(ValueError, match=rf"expert id must be in \[0, 8\), got {expert}"):
            manager.map_global_to_local(expert)


def test_an_explicit_strategy_that_cannot_hold_raises():
    with pytest.raises(ValueError, match=r"^`round_robin` placement needs num_expert_group > 1, got 1$"):
        make(8, ep_ranks(2), placement_strategy="round_robin", num_expert_group=1)
    with pytest.raises(ValueError, match="must be one of linear, round_robin; got 'best'"):
        make(8, ep_ranks(2), placement_strategy="best")


@pytest.mark.parametrize(("groups", "strategy"), [(2, "round_robin"), (1, "linear"), (None, "linear")])
def test_no_strategy_takes_the_one_that_holds_and_says_why(groups, strategy):
    manager = make(8, ep_ranks(2), num_expert_group=groups)
    assert manager.placement_strategy == strategy
    assert (manager.placement_reason is None) == (strategy == "round_robin")


def test_explicit_linear_is_always_honoured():
    assert make(8, ep_ranks(2), placement_strategy="linear", num_expert_group=2).placement_strategy == "linear"


def test_update_resolves_an_open_strategy_anew():
    manager = make(num_expert_group=2)
    assert manager.placement_strategy == "linear"
    grown = manager.update(ranks=ep_ranks(2))
    assert grown.placement_strategy == "round_robin"
    assert grown.update(ranks=ALONE).placement_strategy == "linear"


def test_update_keeps_insisting_on_an_explicit_strategy():
    manager = make(8, ep_ranks(2), num_expert_group=2, placement_strategy="round_robin")
    assert manager.update(ranks=ep_ranks(4, 3)).get_local_expert_ids() == [3, 7]
    with pytest.raises(ValueError, match="needs expert parallelism"):
        manager.update(ranks=ALONE)


def test_update_leaves_the_old_manager_as_it_was():
    manager = make(8, ep_ranks(2))
    manager.update(ranks=ep_ranks(4, 2), global_num_experts=12)
    assert manager == make(8, ep_ranks(2))
    assert manager.get_local_expert_ids() == [0, 1, 2, 3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        manager.global_num_experts = 3
    with pytest.raises(ValueError, match="read-only"):
        manager.expert_map[0] = 1


def test_pr_41046_fused_shared_experts_are_counted_before_and_after_update():
    manager = make(8, ep_ranks(2), num_fused_shared_experts=2)
    assert manager.local_num_experts == 4 + 2
    assert manager.update(ranks=ep_ranks(4)).local_num_experts == 2 + 2
    assert manager.update(ranks=ALONE).local_num_experts == 8 + 2


def test_pr_41046_routing_tables_are_rebuilt_on_update():
    manager = make(8, ep_ranks(2, dp=True), num_expert_group=2, all2all_backend="deepep_low_latency")
    assert manager.routing_tables.local_to_global.tolist() == [0, 2, 4, 6]
    updated = manager.update(ranks=ep_ranks(4, 1, dp=True))
    assert updated.routing_tables.global_to_physical.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert updated.routing_tables.local_to_global.tolist() == [1, 5]
    assert updated.update(global_num_experts=10).routing_tables.local_to_global.tolist() == [1, 5, 9]


def test_routing_tables_exist_only_where_dispatch_addresses_slots():
    by_psum = make(8, ep_ranks(2), num_expert_group=2)
    assert (by_psum.placement_strategy, by_psum.routing_tables) == ("round_robin", None)
    linear = make(8, ep_ranks(2, dp=True), all2all_backend="nixl_ep")
    assert (linear.placement_strategy, linear.routing_tables) == ("linear", None)


def test_routing_tables_do_not_know_fused_shared_experts():
    settings = dict(num_expert_group=2, all2all_backend="nixl_ep", num_fused_shared_experts=1)
    with pytest.raises(ValueError, match="`round_robin` .* needs num_fused_shared_experts = 0, got 1"):
        make(8, ep_ranks(2, dp=True), placement_strategy="round_robin", **settings)
    manager = make(8, ep_ranks(2, dp=True), **settings)
    assert (manager.placement_strategy, manager.routing_tables, manager.local_num_experts) == ("linear", None, 5)
    assert "needs num_fused_shared_experts = 0, got 1" in manager.placement_reason
    # Where tokens travel to no slots, shared experts are in nobody's way.
    assert make(8, ep_ranks(2), **settings).placement_strategy == "round_robin"


def test_the_mask_covers_fused_shared_experts_and_local_ids_do_not():
    manager = make(5, ep_ranks(2, 1), num_fused_shared_experts=2, with_expert_mask=True)
    assert manager.expert_mask.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert manager.get_local_expert_ids() == [3, 4]
    assert manager.local_num_experts == 4


def test_redundant_experts_are_among_the_global_ones():
    manager = make(8, ep_ranks(2, 1), num_redundant_experts=2, num_expert_group=2)
    assert manager.get_local_expert_ids() == [4, 5, 6, 7]
    assert manager.placement_strategy == "linear"
    updated = manager.update(global_num_experts=6, num_redundant_experts=0)
    assert (updated.placement_strategy, updated.get_local_expert_ids()) == ("round_robin", [1, 3, 5])
    with pytest.raises(ValueError, match=r"num_redundant_experts must be in \[0, global_num_experts=8\), got 8"):
        make(8, num_redundant_experts=8)


topologies = st.tuples(st.integers(1, 8), st.integers(1, 40))


@settings(deadline=None)
@given(topologies, topologies, st.integers(0, 2), st.sampled_from([None, 2]))
def test_an_updated_manager_is_what_a_new_one_would_be(before, after, shared, groups):
    for rank in range(after[0]):
        old = make(before[1], ep_ranks(before[0]), num_fused_shared_experts=shared, num_expert_group=groups)
        updated = old.update(ranks=ep_ranks(after[0], rank), global_num_experts=after[1])
        new = make(after[1], ep_ranks(after[0], rank), num_fused_shared_experts=shared, num_expert_group=groups)
        assert updated == new
        assert updated.local_num_experts == new.local_num_experts == len(new.get_local_expert_ids()) + shared
        np.testing.assert_array_equal(updated.expert_map, new.expert_map)
        for local, expert in enumerate(updated.get_local_expert_ids()):
            assert updated.map_global_to_local(expert) == local
