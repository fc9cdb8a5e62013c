"""How many copies each expert gets."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Replication(NamedTuple):
    """Copies of experts, not yet placed: the experts themselves, then one extra copy after the other."""

    expert: Int[np.ndarray, "L P"]
    """The expert of each copy."""
    replica: Int[np.ndarray, "L P"]
    """Its number among the copies of that expert."""
    replica_count: Int[np.ndarray, "L E"]
    """Copies of each expert."""


def replicate_experts(weight: Float[np.ndarray, "L E"], num_replicas: int) -> Replication:
    """Give every expert one copy, and each further copy to the expert with most load per copy so far.

    Of equally loaded experts the first one gets it.

    Raises:
        ValueError: fewer copies than experts.

    Source: DeepSeek EPLB and vLLM `replicate_experts`; spec 5.1.
    """
    num_layers, num_experts = weight.shape
    if num_replicas < num_experts:
        raise ValueError(f"num_replicas must be at least the number of experts, {num_experts}, got {num_replicas}")
    layers = np.arange(num_layers)
    expert = np.empty((num_layers, num_replicas), np.int64)
    expert[:, :num_experts] = np.arange(num_experts)
    replica = np.zeros((num_layers, num_replicas), np.int64)
    count = np.ones((num_layers, num_experts), np.int64)
    for slot in range(num_experts, num_replicas):
        neediest = np.argmax(weight / count.astype(weight.dtype), axis=1)
        expert[:, slot] = neediest
        replica[:, slot] = count[layers, neediest]
        count[layers, neediest] += 1
    return Replication(expert, replica, count)
