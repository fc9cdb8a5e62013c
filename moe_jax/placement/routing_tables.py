"""Routing tables: where round-robin placement puts each expert among all physical slots."""

from typing import NamedTuple

import numpy as np


class RoutingTables(NamedTuple):
    """Translations between an expert's id and its slot; slots count through rank 0, then rank 1, and so on."""

    global_to_physical: np.ndarray
    """int64 `[E]`: the slot of each expert."""
    physical_to_global: np.ndarray
    """int64 `[E]`: the expert in each slot; the inverse."""
    local_to_global: np.ndarray
    """int64 `[local]`: the experts of this rank."""


def build_routing_tables(ep_size: int, ep_rank: int, global_num_experts: int) -> RoutingTables:
    """Tables of round-robin placement: expert `g` is number `g // ep_size` on rank `g % ep_size`.

    Source: vLLM `ensure_round_robin_expert_routing_tables`; spec 3.4.
    """
    experts = np.arange(global_num_experts)
    owner, position = experts % ep_size, experts // ep_size
    base, remainder = divmod(global_num_experts, ep_size)
    global_to_physical = owner * base + np.minimum(owner, remainder) + position
    return RoutingTables(
        global_to_physical=global_to_physical,
        physical_to_global=np.argsort(global_to_physical),
        local_to_global=experts[ep_rank::ep_size],
    )
