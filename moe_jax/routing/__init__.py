"""Routers: hidden states → which experts each token visits, and how much each counts (spec section 2).

Pure functions, one idea per file; `route` joins them as `RouterConfig` says, and `Router` adds the parameters.
"""

from .fused_shared_experts import append_fused_shared_experts, fused_shared_expert_weight
from .route import RoutingResult, route
from .router import Router, RouterOutput, RoutingBuffer
from .simulation import register_strategy
from .zero_experts import ZeroExpertSplit, split_zero_experts

__all__ = [
    "Router",
    "RouterOutput",
    "RoutingBuffer",
    "RoutingResult",
    "ZeroExpertSplit",
    "append_fused_shared_experts",
    "fused_shared_expert_weight",
    "register_strategy",
    "route",
    "split_zero_experts",
]
