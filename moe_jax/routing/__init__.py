"""Routers: hidden states → which experts each token visits, and how much each counts (spec section 2).

Pure functions, one idea per file; `route` joins them as `RouterConfig` says, and `Router` adds the parameters.
"""

from .fused_shared_experts import append_fused_shared_experts, fused_shared_expert_weight
from .method import (
    RouterClass,
    RoutingMethodType,
    get_routing_method_type,
    resolve_router_class,
    routing_method_type,
)
from .route import RoutingResult, checked_choice, route
from .router import Router, RouterOutput, RoutingBuffer
from .simulation import register_strategy
from .zero_experts import ZeroExpertSplit, split_zero_experts

__all__ = [
    "Router",
    "RouterClass",
    "RouterOutput",
    "RoutingBuffer",
    "RoutingMethodType",
    "RoutingResult",
    "ZeroExpertSplit",
    "append_fused_shared_experts",
    "checked_choice",
    "fused_shared_expert_weight",
    "get_routing_method_type",
    "register_strategy",
    "resolve_router_class",
    "route",
    "routing_method_type",
    "split_zero_experts",
]
