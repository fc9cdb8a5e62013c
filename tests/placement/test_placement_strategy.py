"""Which placement strategy is used where (spec 3.2), and the parallelism it depends on (spec 1.8)."""

import pytest

from moe_jax.placement import ParallelRanks, determine_expert_placement_strategy


@pytest.mark.parametrize(
    ("requested", "use_ep", "groups", "redundant", "eplb", "backend", "expected", "reason"),
    [
        ("linear", True, 2, 0, False, "deepep_low_latency", "linear", None),
        ("round_robin", False, 2, 0, False, "deepep_low_latency", "linear", "expert parallelism, got use_ep=False"),
        ("round_robin", True, 1, 0, False, "deepep_low_latency", "linear", "num_expert_group > 1, got 1"),
        ("round_robin", True, 2, 1, False, "deepep_low_latency", "linear", "num_redundant_experts = 0, got 1"),
        ("round_robin", True, 2, 0, True, "deepep_low_latency", "linear", "enable_eplb=False, got True"),
        (
            "round_robin",
            True,
            2,
            0,
            False,
            "allgather_reducescatter",
            "linear",
            "all2all_backend in deepep_low_latency, nixl_ep, padded_all_to_all, ragged_all_to_all, remote_dma; "
            "got 'allgather_reducescatter'",
        ),
        ("round_robin", True, 2, 0, False, "deepep_low_latency", "round_robin", None),
        ("round_robin", True, 2, 0, False, "nixl_ep", "round_robin", None),
    ],
)
def test_upstreams_table(requested, use_ep, groups, redundant, eplb, backend, expected, reason):
    choice = determine_expert_placement_strategy(
        requested,
        ParallelRanks.from_vllm(1, 2, use_ep),
        num_expert_group=groups,
        num_redundant_experts=redundant,
        enable_eplb=eplb,
        all2all_backend=backend,
    )
    assert choice.strategy == expected
    assert choice.reason == (reason and f"`round_robin` placement needs {reason}")


def test_the_backend_does_not_matter_where_tokens_need_not_travel():
    ranks = ParallelRanks.from_vllm(2, 1, True)
    choice = determine_expert_placement_strategy("round_robin", ranks, num_expert_group=2, all2all_backend="any")
    assert choice == ("round_robin", None)


def test_unknown_strategies_are_refused():
    with pytest.raises(ValueError, match="must be one of linear, round_robin; got 'roundrobin'"):
        determine_expert_placement_strategy("roundrobin", ParallelRanks(), num_expert_group=None)


@pytest.mark.parametrize(
    ("tp", "dp", "enable_ep", "tp_size", "ep_size"),
    [
        (2, 1, False, 2, 1),
        (1, 2, False, 2, 1),
        (2, 2, False, 4, 1),
        (2, 1, True, 1, 2),
        (1, 2, True, 1, 2),
        (2, 2, True, 1, 4),
        (1, 1, True, 1, 1),
    ],
)
def test_effective_parallelism_is_upstreams_table_on_every_rank(tp, dp, enable_ep, tp_size, ep_size):
    flat_rank = 0
    for dp_rank in range(dp):
        for tp_rank in range(tp):
            ranks = ParallelRanks.from_vllm(tp, dp, enable_ep, tp_rank=tp_rank, dp_rank=dp_rank)
            assert (ranks.tp_size, ranks.tp_rank) == (tp_size, flat_rank if tp_size > 1 else 0)
            assert (ranks.ep_size, ranks.ep_rank) == (ep_size, flat_rank if ep_size > 1 else 0)
            assert ranks.use_ep == (ep_size > 1)
            flat_rank += 1


def test_context_parallel_ranks_lie_between_data_and_tensor_ranks():
    ranks = ParallelRanks.from_vllm(2, 3, True, pcp=5, tp_rank=1, dp_rank=2, pcp_rank=3)
    assert (ranks.ep_size, ranks.ep_rank) == (30, 2 * 10 + 3 * 2 + 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"tp": 2, "enable_ep": True}, False),
        ({"dp": 2, "enable_ep": True}, True),
        ({"dp": 2, "enable_ep": False}, False),
        ({"pcp": 2, "enable_ep": True}, True),
        ({"tp": 2, "enable_ep": True, "sequence_parallel": True}, True),
    ],
)
def test_tokens_travel_only_between_expert_parallel_ranks_with_different_tokens(arguments, expected):
    assert ParallelRanks.from_vllm(**arguments).use_all2all == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ParallelRanks.from_vllm(2, 2, True, dp_rank=2), r"dp_rank must be in \[0, 2\), got 2"),
        (lambda: ParallelRanks.from_vllm(0), "tp must be positive, got 0"),
        (lambda: ParallelRanks(dp_size=0), "dp_size must be positive, got 0"),
        (lambda: ParallelRanks(sp_size=-1), "sp_size must be positive, got -1"),
        (lambda: ParallelRanks(ep_size=2), "ep_size must be 1 when use_ep=False, got 2"),
        (lambda: ParallelRanks(ep_size=2, ep_rank=-1, use_ep=True), r"ep_rank must be in \[0, 2\), got -1"),
    ],
)
def test_ranks_outside_their_group_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
