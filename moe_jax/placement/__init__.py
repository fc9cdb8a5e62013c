"""Placement: which expert lives on which rank (spec section 3), and how load decides it (spec section 5)."""

from .balancedness import LoadStatistics, expected_physical_load, load_statistics, logical_load, rank_load
from .expert_map import ExpertMap, determine_expert_map
from .logical_maps import LogicalMaps, compute_logical_maps
from .manager import ExpertMapManager
from .packing import Packing, balanced_packing
from .ranks import ParallelRanks
from .rebalancing import Rebalancing, rebalance_experts
from .replication import Replication, replicate_experts
from .resident_slots import preserve_resident_slots
from .routing_tables import RoutingTables, build_routing_tables
from .strategy import PlacementChoice, PlacementStrategy, determine_expert_placement_strategy

__all__ = [
    "ExpertMap",
    "ExpertMapManager",
    "LoadStatistics",
    "LogicalMaps",
    "Packing",
    "ParallelRanks",
    "PlacementChoice",
    "PlacementStrategy",
    "Rebalancing",
    "Replication",
    "RoutingTables",
    "balanced_packing",
    "build_routing_tables",
    "compute_logical_maps",
    "determine_expert_map",
    "determine_expert_placement_strategy",
    "expected_physical_load",
    "load_statistics",
    "logical_load",
    "preserve_resident_slots",
    "rank_load",
    "rebalance_experts",
    "replicate_experts",
]
