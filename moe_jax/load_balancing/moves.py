"""Which slot each expert's weights come from when the placement changes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moe_jax.placement.ranks import slots_per_rank


class Moves(NamedTuple):
    """Where the content of every slot comes from."""

    source: Int[np.ndarray, "L P"]
    """int32: the slot, under the old placement, whose content each slot takes."""
    sent: int
    """Slots filled from another rank."""
    copied: int
    """Slots filled from another slot of their rank."""


def plan_moves(
    old_physical_to_logical: Int[np.ndarray, "L P"], new_physical_to_logical: Int[np.ndarray, "L P"], num_ranks: int
) -> Moves:
    """Choose a source for every slot: itself if its expert stays, else its own rank, else another one.

    Of several ranks that hold a copy, the one that has sent fewest so far sends.

    Raises:
        ValueError: placements of different shapes, slots that cannot be split over the ranks, or an expert that no slot
            held.
    """
    old, new = np.asarray(old_physical_to_logical), np.asarray(new_physical_to_logical)
    if old.shape != new.shape:
        raise ValueError(f"the new placement must have the old one's shape {old.shape}, got {new.shape}")
    num_layers, num_slots = old.shape
    rank_of = np.arange(num_slots) // slots_per_rank(num_slots, num_ranks)
    source = np.broadcast_to(np.arange(num_slots, dtype=np.int32), old.shape).copy()
    sent = copied = 0
    for layer in range(num_layers):
        sends = np.zeros(num_ranks, np.int64)
        for slot in np.flatnonzero(old[layer] != new[layer]):
            holders = np.flatnonzero(old[layer] == new[layer, slot])
            if not len(holders):
                raise ValueError(f"no slot held expert {new[layer, slot]} of layer {layer} before")
            own = holders[rank_of[holders] == rank_of[slot]]
            if len(own):
                source[layer, slot] = own[0]
                copied += 1
            else:
                chosen = holders[np.argmin(sends[rank_of[holders]])]
                source[layer, slot] = chosen
                sends[rank_of[chosen]] += 1
                sent += 1
    return Moves(source, sent, copied)
