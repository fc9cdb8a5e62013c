"""Expert parallelism load balancing (EPLB): from measured load to a new placement of experts on ranks."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .logical_maps import compute_logical_maps
from .packing import balanced_packing
from .replication import replicate_experts
from .resident_slots import preserve_resident_slots


class Rebalancing(NamedTuple):
    """A placement for every layer, int32."""

    physical_to_logical: Int[np.ndarray, "L P"]
    """The logical expert in each slot; slots count through rank 0, then rank 1, and so on."""
    logical_to_physical: Int[np.ndarray, "L E R"]
    """Slots of each expert's copies, ascending, padded with -1; R = P - E + 1."""
    replica_count: Int[np.ndarray, "L E"]
    """Copies of each expert."""


def rebalance_experts(
    weight: Float[np.ndarray, "L E"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_ranks: int,
    old_global_expert_indices: Int[np.ndarray, "L P"] | None = None,
) -> Rebalancing:
    """Place `num_replicas` copies of the experts on `num_ranks` ranks so that each rank gets about the same load.

    Where `num_groups` is a multiple of `num_nodes`, the experts of a routing group stay on one node, so that tokens of
    group-limited routing cross few node borders; otherwise all ranks share all experts.

    Args:
        weight: load of each logical expert, of each layer.
        num_replicas: physical experts, P.
        num_groups: equal, contiguous groups of experts (group-limited routing); 1 without.
        num_nodes: machines, each with `num_ranks / num_nodes` ranks.
        num_ranks: ranks of expert parallelism.
        old_global_expert_indices: the placement so far (physical to logical). Experts that stay on their rank then keep
            their slot.

    Raises:
        ValueError: sizes that do not divide each other.

    Source: DeepSeek EPLB and vLLM `DefaultEplbPolicy.rebalance_experts`; spec 5.1.
    """
    weight = np.asarray(weight, np.float32)
    if weight.ndim != 2:
        raise ValueError(f"weight must have the shape (layers, experts), got {weight.shape}")
    num_experts = weight.shape[1]
    if min(num_groups, num_nodes, num_ranks) < 1:
        raise ValueError(
            "num_groups, num_nodes and num_ranks must be positive, "
            f"got num_groups={num_groups}, num_nodes={num_nodes}, num_ranks={num_ranks}"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    placement = _rebalance_hierarchically(weight, num_replicas, num_groups, num_nodes, num_ranks)
    if old_global_expert_indices is not None:
        placement = preserve_resident_slots(placement, num_ranks, np.asarray(old_global_expert_indices))
    return Rebalancing(placement.astype(np.int32), *compute_logical_maps(placement, num_experts))


def _rebalance_hierarchically(
    weight: Float[np.ndarray, "L E"], num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Int[np.ndarray, "L P"]:
    """Groups to nodes, then copies inside each node, then the node's copies to its ranks."""
    num_layers, num_experts = weight.shape
    for name, size, divisor_name, divisor in (
        ("the number of experts", num_experts, "num_groups", num_groups),
        ("num_ranks", num_ranks, "num_nodes", num_nodes),
        ("num_replicas", num_replicas, "num_ranks", num_ranks),
    ):
        if size % divisor:
            raise ValueError(f"{name} must be a multiple of {divisor_name}={divisor}, got {size}")
    if num_replicas < num_experts:
        raise ValueError(f"num_replicas must be at least the number of experts, {num_experts}, got {num_replicas}")

    # "Node order" lists the experts of node 0, then those of node 1, and so on.
    group_size = num_experts // num_groups
    node, place = balanced_packing(weight.reshape(num_layers, num_groups, group_size).sum(axis=-1), num_nodes)
    group_in_node_order = node * (num_groups // num_nodes) + place
    in_node_order = (group_in_node_order[..., None] * group_size + np.arange(group_size)).reshape(weight.shape)
    expert_of_node_order = _inverse(in_node_order)

    # From here on every node of every layer is a row of its own.
    node_weight = np.take_along_axis(weight, expert_of_node_order, axis=1)
    node_weight = node_weight.reshape(num_layers * num_nodes, num_experts // num_nodes)
    copies = replicate_experts(node_weight, num_replicas // num_nodes)
    weight_per_copy = np.take_along_axis(node_weight / copies.replica_count.astype(np.float32), copies.expert, axis=1)
    rank, slot = balanced_packing(weight_per_copy, num_ranks // num_nodes)
    copy_in_slot = _inverse(rank * (num_replicas // num_ranks) + slot)

    expert = np.take_along_axis(copies.expert, copy_in_slot, axis=1).reshape(num_layers, num_nodes, -1)
    expert += np.arange(num_nodes)[:, None] * (num_experts // num_nodes)
    return np.take_along_axis(expert_of_node_order, expert.reshape(num_layers, num_replicas), axis=1)


def _inverse(permutation: Int[np.ndarray, "L n"]) -> Int[np.ndarray, "L n"]:
    """The inverse of each row's permutation."""
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.arange(permutation.shape[1])[None], axis=1)
    return inverse
