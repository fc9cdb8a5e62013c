"""Experts that stay on their rank keep their slot."""

import numpy as np
from jaxtyping import Int

from .ranks import slots_per_rank


def preserve_resident_slots(
    physical_to_logical: Int[np.ndarray, "L P"], num_ranks: int, old_physical_to_logical: Int[np.ndarray, "L P"]
) -> Int[np.ndarray, "L P"]:
    """Reorder the slots inside every rank so that experts which were there already are where they were.

    Which rank holds what stays as it is, so the balance does, too; only fewer weights have to be copied. Newcomers fill
    the free slots of their rank in the order in which they came.

    Raises:
        ValueError: placements of different shapes, or slots that cannot be split over the ranks.

    Source: vLLM `preserve_intragpu_slots`; spec 5.4.
    """
    if physical_to_logical.shape != old_physical_to_logical.shape:
        raise ValueError(
            f"the old placement must have the new one's shape {physical_to_logical.shape}, "
            f"got {old_physical_to_logical.shape}"
        )
    num_layers, num_slots = physical_to_logical.shape
    # The same for every rank of every layer: rows of what was there and what will be there.
    new = physical_to_logical.reshape(num_layers * num_ranks, slots_per_rank(num_slots, num_ranks))
    old = old_physical_to_logical.reshape(new.shape)
    rows = np.arange(len(new))
    result = np.empty_like(new)
    is_placed = np.zeros(new.shape, bool)  # of the new experts
    is_taken = np.zeros(new.shape, bool)  # of the slots
    for slot in range(new.shape[1]):
        matches = (new == old[:, slot, None]) & ~is_placed
        first = np.argmax(matches, axis=1)
        stays = matches[rows, first]
        result[stays, slot] = old[stays, slot]
        is_taken[stays, slot] = True
        is_placed[rows[stays], first[stays]] = True
    result[~is_taken] = new[~is_placed]  # row by row: each has as many free slots as newcomers
    return result.reshape(physical_to_logical.shape)
