"""vLLM's names for routers: which of its routing methods and router classes a configuration amounts to.

Nothing here decides how tokens are routed: it is for people who compare, and for kernels that support only some.
"""

import enum

from moe_jax.config import RouterConfig, ScoringFunction


class RoutingMethodType(enum.IntEnum):
    """What a router computes, with vLLM's numbers (spec 2.2)."""

    DEFAULT = 0
    """Softmax, then top-k."""
    RENORMALIZE = 1
    """Top-k, then softmax over the chosen."""
    DEEPSEEK_V3 = 2
    """Sigmoid, correction bias, groups, renormalised."""
    LLAMA4 = 3
    """Top-1, then sigmoid."""
    RENORMALIZE_NAIVE = 4
    """Softmax, then top-k, then divided by the sum; mathematically the same as `RENORMALIZE`."""
    TOP_K = 5
    SIGMOID_RENORM = 6
    """Sigmoid, then top-k, then divided by the sum."""
    MINIMAX2 = 7
    """Sigmoid with correction bias, no groups, renormalised, not scaled."""
    SIGMOID = 8
    """Sigmoid, then top-k."""
    UNSPECIFIED = 9
    """None of these."""
    DEEPSEEK_V4 = 100
    """Sqrtsoftplus, renormalised."""
    CUSTOM = 101
    SIMULATED = 102


class RouterClass(enum.StrEnum):
    """vLLM's router classes, in the order in which they are considered (spec 2.1)."""

    ROUTING_SIMULATOR = "RoutingSimulatorRouter"
    ZERO_EXPERT = "ZeroExpertRouter"
    GROUPED_TOP_K = "GroupedTopKRouter"
    CUSTOM_ROUTING = "CustomRoutingRouter"
    FUSED_TOP_K_BIAS = "FusedTopKBiasRouter"
    FUSED_TOP_K = "FusedTopKRouter"


def get_routing_method_type(
    scoring: ScoringFunction,
    *,
    renormalize: bool,
    num_expert_group: int | None = None,
    has_bias: bool = False,
    routed_scaling_factor: float | None = None,
) -> RoutingMethodType:
    """The method of a router that scores, chooses and perhaps renormalises (spec 2.2).

    Args:
      scoring: name of the scoring function.
      renormalize: weights are divided by their sum.
      num_expert_group: number of expert groups; None or 0: no groups.
      has_bias: a correction bias steers the choice.
      routed_scaling_factor: factor that the router applies to its weights; None: 1.

    Source: vLLM `get_routing_method_type`.
    """
    if scoring == "sqrtsoftplus":
        return RoutingMethodType.DEEPSEEK_V4 if renormalize else RoutingMethodType.UNSPECIFIED
    if has_bias:
        if scoring != "sigmoid" or not renormalize:
            return RoutingMethodType.UNSPECIFIED
        if num_expert_group:
            return RoutingMethodType.DEEPSEEK_V3
        is_scaled = routed_scaling_factor not in (None, 1.0)
        return RoutingMethodType.UNSPECIFIED if is_scaled else RoutingMethodType.MINIMAX2
    if scoring == "sigmoid":
        return RoutingMethodType.SIGMOID_RENORM if renormalize else RoutingMethodType.SIGMOID
    return RoutingMethodType.RENORMALIZE_NAIVE if renormalize else RoutingMethodType.DEFAULT


def routing_method_type(config: RouterConfig, top_k: int) -> RoutingMethodType:
    """The method that `config` amounts to."""
    if config.simulation is not None:
        return RoutingMethodType.SIMULATED
    if config.custom is not None:
        return RoutingMethodType.CUSTOM
    is_plain = not (config.correction_bias or config.num_zero_experts or config.per_expert_scale)
    if config.score_after_top_k and is_plain:
        if config.scoring == "softmax":
            return RoutingMethodType.RENORMALIZE
        if config.scoring == "sigmoid" and top_k == 1 and not config.renormalize:
            return RoutingMethodType.LLAMA4
    is_unlisted = (
        config.score_after_top_k
        or config.num_zero_experts
        or config.sparsemixer_jitter is not None
        or config.per_expert_scale
    )
    if is_unlisted:
        return RoutingMethodType.UNSPECIFIED
    return get_routing_method_type(
        config.scoring,
        renormalize=config.renormalize,
        num_expert_group=config.group_limit.num_groups if config.group_limit is not None else None,
        has_bias=config.correction_bias,
        routed_scaling_factor=_router_scale(config),
    )


def resolve_router_class(config: RouterConfig) -> RouterClass:
    """The class that vLLM would build for `config` (spec 2.1).

    One group of which one is kept limits nothing; vLLM then builds a plain router, unless only the grouped one scales
    as asked or has a fast kernel (DeepSeek-V3's method). Where vLLM's plain router would drop a scaling factor, ours
    applies it.
    """
    if config.simulation is not None:
        return RouterClass.ROUTING_SIMULATOR
    if config.num_zero_experts:
        return RouterClass.ZERO_EXPERT
    if config.group_limit is not None and not _plain_router_suffices(config):
        return RouterClass.GROUPED_TOP_K
    computes_weights_itself = (
        config.custom is not None
        or config.score_after_top_k
        or config.sparsemixer_jitter is not None
        or config.per_expert_scale
    )
    if computes_weights_itself:
        return RouterClass.CUSTOM_ROUTING
    if config.correction_bias or config.hash_vocab_size is not None:
        return RouterClass.FUSED_TOP_K_BIAS
    return RouterClass.FUSED_TOP_K


def _plain_router_suffices(config: RouterConfig) -> bool:
    limit = config.group_limit
    if limit is None or (limit.num_groups, limit.groups_kept) != (1, 1):
        return False
    if config.correction_bias:
        method = get_routing_method_type(
            config.scoring, renormalize=config.renormalize, num_expert_group=1, has_bias=True
        )
        return method != RoutingMethodType.DEEPSEEK_V3
    return _router_scale(config) == 1.0


def _router_scale(config: RouterConfig) -> float:
    return 1.0 if config.apply_scale_to_output else config.routed_scaling_factor
