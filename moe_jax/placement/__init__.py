"""Placement: which expert lives on which rank (spec section 3)."""

from .expert_map import ExpertMap, determine_expert_map
from .manager import ExpertMapManager
from .ranks import ParallelRanks
from .routing_tables import RoutingTables, build_routing_tables
from .strategy import PlacementChoice, PlacementStrategy, determine_expert_placement_strategy

__all__ = [
    "ExpertMap",
    "ExpertMapManager",
    "ParallelRanks",
    "PlacementChoice",
    "PlacementStrategy",
    "RoutingTables",
    "build_routing_tables",
    "determine_expert_map",
    "determine_expert_placement_strategy",
]
