"""Redundant experts: several physical copies of one logical expert, and which copy a token goes to (spec 4.1, 5.7)."""

from typing import Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

# Fibonacci hashing: the odd integer nearest to 2**32 / golden ratio spreads consecutive token indices evenly.
_HASH_MULTIPLIER = np.uint32(0x9E3779B9)


class PlacementTable(nnx.Variable):
    """A table of the expert placement: state that load balancing replaces, without a gradient."""


def initial_physical_to_logical(num_experts: int, num_redundant_experts: int) -> np.ndarray:
    """The logical expert in each slot of a fresh model, `[P]` int32: all of them, then copies from expert 0 on."""
    return np.concatenate([np.arange(num_experts), np.arange(num_redundant_experts) % num_experts]).astype(np.int32)


def invert_placement(physical_to_logical: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each logical expert lives.

    Args:
        physical_to_logical: `[P]`, the logical expert in each physical slot.
        num_experts: logical experts.

    Returns:
        `logical_to_physical` `[E, P - E + 1]` int32, slots in ascending order, padded with -1 (the width holds any
        placement, so tables can be replaced without recompiling), and `replica_count` `[E]` int32.

    Raises:
        ValueError: a logical expert has no slot.
    """
    count = np.bincount(physical_to_logical, minlength=num_experts).astype(np.int32)
    if missing := np.flatnonzero(count == 0).tolist():
        raise ValueError(f"every logical expert needs a physical slot, got none for {missing}")
    table = np.full((num_experts, len(physical_to_logical) - num_experts + 1), -1, np.int32)
    for expert in range(num_experts):
        slots = np.flatnonzero(physical_to_logical == expert)
        table[expert, : len(slots)] = slots
    return table, count


def choose_replicas(
    topk_ids: Int[Array, "T K"], logical_to_physical: Int[Array, "E R"], replica_count: Int[Array, "E"]
) -> Int[Array, "T K"]:
    """Physical ids of logical ones: of each expert it chose, a token takes the copy that a hash of its index names.

    A hash of the token, not of its position in the flattened ids: that one always met the same copy when K was a
    multiple of the number of copies. Ids that name no expert (negative, or E and above) become -1.

    Source: vLLM `eplb_map_to_physical_and_record`; spec 5.7.
    """
    num_experts = replica_count.shape[0]
    is_expert = (topk_ids >= 0) & (topk_ids < num_experts)
    expert = jnp.where(is_expert, topk_ids, 0)
    token_hash = jnp.arange(topk_ids.shape[0], dtype=jnp.uint32) * _HASH_MULTIPLIER
    replica = token_hash[:, None] % replica_count[expert].astype(jnp.uint32)
    return jnp.where(is_expert, logical_to_physical[expert, replica.astype(jnp.int32)], -1)


class ReplicaMap(nnx.Module):
    """The tables of `choose_replicas`, as state of a layer: data that may change from step to step.

    Attributes:
        logical_to_physical: `[E, R]` int32, -1 where there is no copy.
        replica_count: `[E]` int32.
    """

    def __init__(self, physical_to_logical: np.ndarray, num_experts: int):
        """Tables of the placement `physical_to_logical` (`[P]`) of `num_experts` logical experts."""
        table, count = invert_placement(physical_to_logical, num_experts)
        self.logical_to_physical = PlacementTable(jnp.asarray(table))
        self.replica_count = PlacementTable(jnp.asarray(count))

    @classmethod
    def initial(cls, num_experts: int, num_redundant_experts: int) -> Self:
        """The placement of a fresh model."""
        return cls(initial_physical_to_logical(num_experts, num_redundant_experts), num_experts)

    def __call__(self, topk_ids: Int[Array, "T K"]) -> Int[Array, "T K"]:
        """Physical ids of logical ones."""
        return choose_replicas(topk_ids, self.logical_to_physical[...], self.replica_count[...])
