"""From slots to experts and back: the tables that say where each logical expert's copies are."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class LogicalMaps(NamedTuple):
    """Where each logical expert lives."""

    logical_to_physical: Int[np.ndarray, "... E R"]
    """Slots of each expert's copies, ascending, padded with -1. R = P - E + 1 holds any placement, so that tables can
    be replaced without recompiling."""
    replica_count: Int[np.ndarray, "... E"]
    """Copies of each expert."""


def compute_logical_maps(physical_to_logical: Int[np.ndarray, "... P"], num_experts: int) -> LogicalMaps:
    """Invert a placement, of one layer or of several.

    Args:
        physical_to_logical: the logical expert in each slot; -1 marks an empty one.
        num_experts: logical experts, E.

    Returns:
        int32 tables.

    Raises:
        ValueError: a slot names no expert, or an expert has no slot.

    Source: vLLM `compute_logical_maps`; spec 5.5.
    """
    placement = np.asarray(physical_to_logical)
    num_slots = placement.shape[-1]
    if placement.size and not (placement.min() >= -1 and placement.max() < num_experts):
        wrong = placement[(placement < -1) | (placement >= num_experts)][0]
        raise ValueError(f"a slot must hold a logical expert in [0, {num_experts}), or -1 for none; got {wrong}")
    layers = placement.reshape(-1, num_slots)
    holds = layers[:, None, :] == np.arange(num_experts)[:, None]  # [layers, E, P]
    count = holds.sum(axis=-1, dtype=np.int32)
    if not count.all():
        missing = sorted(set(np.nonzero(count == 0)[1].tolist()))
        raise ValueError(f"every logical expert needs a physical slot, got none for {missing}")
    table = np.full((len(layers), num_experts, num_slots - num_experts + 1), -1, np.int32)
    layer, expert, slot = np.nonzero(holds)
    replica = np.cumsum(holds, axis=-1)[layer, expert, slot] - 1
    table[layer, expert, replica] = slot
    leading = placement.shape[:-1]
    return LogicalMaps(table.reshape(*leading, *table.shape[1:]), count.reshape(*leading, num_experts))
