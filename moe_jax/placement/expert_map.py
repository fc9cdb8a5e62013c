"""The expert map: global expert id → index among the experts of one rank."""

from typing import NamedTuple

import numpy as np

from .strategy import PlacementStrategy, check_strategy


class ExpertMap(NamedTuple):
    """Which experts one rank holds."""

    local_num_experts: int
    """Routed experts on this rank."""
    expert_map: np.ndarray | None
    """int32 `[global (+ fused shared)]`: local index of each expert, -1 where it lives elsewhere; None: all local."""
    expert_mask: np.ndarray | None
    """int32 `[global + fused shared + 1]`: 1 where the expert is local; the last entry, 0, stands for "no expert"."""


def determine_expert_map(
    ep_size: int,
    ep_rank: int,
    global_num_experts: int,
    expert_placement_strategy: PlacementStrategy = "linear",
    num_fused_shared_experts: int = 0,
    return_expert_mask: bool = False,
) -> ExpertMap:
    """Deal `global_num_experts` experts out to `ep_size` ranks and say what rank `ep_rank` gets.

    Where they cannot be dealt evenly, the *first* ranks get one more. Fused shared experts live on every rank, behind
    its routed experts; they enter map and mask only with `return_expert_mask`, as kernels that take a mask address them
    by global id.

    Raises:
      ValueError: unknown strategy, or a size or rank out of range.

    Source: vLLM `determine_expert_map`; spec 3.1.
    """
    check_strategy(expert_placement_strategy)
    if ep_size < 1:
        raise ValueError(f"ep_size must be positive, got {ep_size}")
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"ep_rank must be in [0, {ep_size}), got {ep_rank}")
    if global_num_experts < 1:
        raise ValueError(f"global_num_experts must be positive, got {global_num_experts}")
    if num_fused_shared_experts < 0:
        raise ValueError(f"num_fused_shared_experts must not be negative, got {num_fused_shared_experts}")
    if ep_size == 1:
        return ExpertMap(global_num_experts, None, None)

    local_ids = local_expert_ids(ep_size, ep_rank, global_num_experts, expert_placement_strategy)
    expert_map = np.full(global_num_experts, -1, np.int32)
    expert_map[local_ids] = np.arange(len(local_ids), dtype=np.int32)
    if not return_expert_mask:
        return ExpertMap(len(local_ids), expert_map, None)

    shared_indices = len(local_ids) + np.arange(num_fused_shared_experts, dtype=np.int32)
    shared_and_sentinel = np.array([1] * num_fused_shared_experts + [0], np.int32)
    return ExpertMap(
        local_num_experts=len(local_ids),
        expert_map=np.concatenate([expert_map, shared_indices]),
        expert_mask=np.concatenate([(expert_map >= 0).astype(np.int32), shared_and_sentinel]),
    )


def local_expert_ids(ep_size: int, ep_rank: int, global_num_experts: int, strategy: PlacementStrategy) -> np.ndarray:
    """Global ids of rank `ep_rank`'s experts, int64, in the order of their local indices."""
    if strategy == "round_robin":
        return np.arange(ep_rank, global_num_experts, ep_size)
    base, remainder = divmod(global_num_experts, ep_size)
    start = ep_rank * base + min(ep_rank, remainder)
    return np.arange(start, start + base + (ep_rank < remainder))
