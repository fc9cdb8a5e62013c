"""How evenly the ranks are loaded."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from .ranks import slots_per_rank


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
    return physical_load.reshape(num_layers, num_ranks, slots_per_rank(num_slots, num_ranks)).sum(axis=-1)


def load_statistics(load: Num[np.ndarray, "L D"]) -> LoadStatistics:
    """Mean, maximum and balancedness of the loads of `D` ranks; no load at all counts as balanced.

    Source: vLLM `EplbState.step`; spec 5.5.
    """
    mean, maximum = float(load.mean(axis=1).sum()), float(load.max(axis=1).sum())
    return LoadStatistics(mean, maximum, mean / maximum if maximum else 1.0)


def logical_load(
    physical_load: Num[np.ndarray, "L P"], physical_to_logical: Int[np.ndarray, "L P"], num_experts: int
) -> Float[np.ndarray, "L E"]:
    """What each logical expert got in all its slots, float64. What empty slots (-1) got counts for none.

    Raises:
        ValueError: a slot holds an expert outside `[0, num_experts)`.
    """
    _check_experts(physical_to_logical, num_experts)
    layers, slots = np.nonzero(physical_to_logical >= 0)
    total = np.zeros((len(physical_load), num_experts))
    np.add.at(total, (layers, physical_to_logical[layers, slots]), physical_load[layers, slots])
    return total


def expected_physical_load(
    load: Num[np.ndarray, "L E"], physical_to_logical: Int[np.ndarray, "L P"], num_experts: int
) -> Float[np.ndarray, "L P"]:
    """What each slot would get if the copies of an expert shared its load evenly, float64; empty slots (-1) get nothing.

    Raises:
        ValueError: a slot holds an expert outside `[0, num_experts)`.
    """
    count = logical_load(np.ones(physical_to_logical.shape), physical_to_logical, num_experts)
    is_held = physical_to_logical >= 0
    shares = np.take_along_axis(load / np.maximum(count, 1), np.where(is_held, physical_to_logical, 0), axis=1)
    return np.where(is_held, shares, 0.0)


def _check_experts(physical_to_logical: Int[np.ndarray, "L P"], num_experts: int) -> None:
    wrong = physical_to_logical[(physical_to_logical < -1) | (physical_to_logical >= num_experts)]
    if wrong.size:
        raise ValueError(f"slots must hold experts in [0, {num_experts}), or -1 for none; got {wrong[0]}")
