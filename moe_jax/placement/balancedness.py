"""How evenly the ranks are loaded."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num


class LoadStatistics(NamedTuple):
    """Load of the ranks, summed over layers, because ranks wait for each other in every layer."""

    mean: float
    """Rows per rank."""
    maximum: float
    """Rows of the busiest rank of each layer."""
    balancedness: float
    """`mean / maximum`: 1 where all ranks have the same load, 1 / ranks where one rank has it all."""


def rank_load(physical_load: Num[np.ndarray, "L P"], num_ranks: int) -> Num[np.ndarray, "L D"]:
    """Sum the load of each rank's slots.

    Raises:
        ValueError: slots that cannot be split over the ranks.
    """
    num_layers, num_slots = physical_load.shape
    if num_ranks < 1 or num_slots % num_ranks:
        raise ValueError(f"the number of ranks must divide the {num_slots} physical slots, got {num_ranks}")
    return physical_load.reshape(num_layers, num_ranks, -1).sum(axis=-1)


def load_statistics(load: Num[np.ndarray, "L D"]) -> LoadStatistics:
    """Mean, maximum and balancedness of the loads of `D` ranks; no load at all counts as balanced.

    Source: vLLM `EplbState.step`; spec 5.5.
    """
    mean, maximum = float(load.mean(axis=1).sum()), float(load.max(axis=1).sum())
    return LoadStatistics(mean, maximum, mean / maximum if maximum else 1.0)


def logical_load(
    physical_load: Num[np.ndarray, "L P"], physical_to_logical: np.ndarray, num_experts: int
) -> Float[np.ndarray, "L E"]:
    """What each logical expert got in all its slots, float64."""
    total = np.zeros((len(physical_load), num_experts))
    np.add.at(total, (np.arange(len(total))[:, None], physical_to_logical), physical_load)
    return total


def expected_physical_load(
    load: Num[np.ndarray, "L E"], physical_to_logical: np.ndarray, num_experts: int
) -> Float[np.ndarray, "L P"]:
    """What each slot would get if the copies of an expert shared its load evenly, float64."""
    ones = np.ones(np.shape(physical_to_logical))
    count = logical_load(ones, physical_to_logical, num_experts)
    return np.take_along_axis(load / np.maximum(count, 1), physical_to_logical, axis=1)
