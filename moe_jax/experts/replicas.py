"""Redundant experts: several physical copies of one logical expert, and which copy a token goes to (spec 4.1, 5.7)."""

from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from moe_jax.placement import compute_logical_maps

# Fibonacci hashing: the odd integer nearest to 2**32 / golden ratio spreads consecutive token indices evenly.
_HASH_MULTIPLIER = np.uint32(0x9E3779B9)


class PlacementTable(nnx.Variable):
    """A table of the expert placement: state that load balancing replaces, without a gradient."""


def initial_physical_to_logical(num_experts: int, num_redundant_experts: int) -> np.ndarray:
    """The logical expert in each slot of a fresh model, `[P]` int32: all of them, then copies from expert 0 on."""
    return np.concatenate([np.arange(num_experts), np.arange(num_redundant_experts) % num_experts]).astype(np.int32)


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
    """Which slot holds which expert, as state of a layer: data that may change from step to step.

    The tables of scanned layers are stacked along leading dimensions, which a scan takes off before a call.

    Attributes:
        physical_to_logical: `[P]` int32, the logical expert in each slot.
        logical_to_physical: `[E, R]` int32, the slots of each expert, -1 where there is no copy.
        replica_count: `[E]` int32.
    """

    def __init__(self, physical_to_logical: np.ndarray, num_experts: int):
        """Tables of the placement `physical_to_logical` (`[P]`) of `num_experts` logical experts."""
        tables = _tables(physical_to_logical, num_experts)
        self.physical_to_logical = PlacementTable(jnp.asarray(tables["physical_to_logical"]))
        self.logical_to_physical = PlacementTable(jnp.asarray(tables["logical_to_physical"]))
        self.replica_count = PlacementTable(jnp.asarray(tables["replica_count"]))

    @classmethod
    def initial(cls, num_experts: int, num_redundant_experts: int) -> Self:
        """The placement of a fresh model."""
        return cls(initial_physical_to_logical(num_experts, num_redundant_experts), num_experts)

    def replace(self, physical_to_logical: Int[np.ndarray, "... P"]) -> None:
        """Take over another placement, in place and on the same devices. The weights must move with it.

        Raises:
            ValueError: another number of slots or layers, or an expert without a slot.
        """
        shape = self.physical_to_logical.shape
        if physical_to_logical.shape != shape:
            raise ValueError(f"the placement must have the shape {shape}, got {physical_to_logical.shape}")
        for name, table in _tables(physical_to_logical, self.replica_count.shape[-1]).items():
            variable = getattr(self, name)
            old = variable[...]
            variable[...] = jax.device_put(table, old.sharding) if old.committed else jnp.asarray(table)

    def __call__(self, topk_ids: Int[Array, "T K"]) -> Int[Array, "T K"]:
        """Physical ids of logical ones."""
        return choose_replicas(topk_ids, self.logical_to_physical[...], self.replica_count[...])


def _tables(physical_to_logical: Int[np.ndarray, "... P"], num_experts: int) -> dict[str, np.ndarray]:
    """The three tables of a placement, int32."""
    maps = compute_logical_maps(physical_to_logical, num_experts)
    return {"physical_to_logical": physical_to_logical.astype(np.int32), **maps._asdict()}
