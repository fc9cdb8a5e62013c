"""Whether parts that a layer was given belong to its config and its mesh."""

from typing import Any

from moe_jax.config import MoEConfig
from moe_jax.experts import RoutedExperts, SharedExperts
from moe_jax.experts.routed import ExpertComputation
from moe_jax.routing import Router


def check_built_for(config: MoEConfig, router: Any, routed_experts: Any, *, has_mesh: bool) -> None:
    """Raise ValueError for a `Router` or `RoutedExperts` built for another config, or for one rank only.

    Parts of other kinds are their author's own; experts of another kind can be called, but not split over a mesh, nor joined by
    shared experts, and a router of another kind cannot be told to scale.

    A router that scales by another plan than the layer's would apply the factor twice or not at all, and tokens of experts that
    are missing would get nothing, both without a word.
    """
    manager = getattr(routed_experts, "expert_map_manager", None)
    if manager is not None and manager.expert_map is not None:
        # Its routed output would be a part, added to a whole shared output. On a mesh the layer splits them alike.
        raise ValueError(
            "routed_experts must hold every expert of the layer, or be split by mesh=; "
            f"got those of rank {manager.ranks.ep_rank} of {manager.ranks.ep_size}"
        )
    if isinstance(router, Router):
        _compare("router", "router", router.config, config.router)
        _compare("router", "num_experts", router.num_experts, config.num_experts)
        _compare("router", "top_k", router.top_k, config.top_k)
    elif config.router.routed_scaling_factor != 1.0 and not config.router.apply_scale_to_output:
        raise ValueError(
            f"routed_scaling_factor={config.router.routed_scaling_factor} would be lost: a {type(router).__name__} scales its own "
            "weights if at all; set apply_scale_to_output=True, so that the layer scales, or leave the factor at 1"
        )
    if not isinstance(routed_experts, RoutedExperts):
        if has_mesh or config.fuse_shared_experts:
            what = "a layer on a mesh" if has_mesh else "fuse_shared_experts=True"
            raise ValueError(f"{what} needs a RoutedExperts as routed_experts, got {type(routed_experts).__name__}")
    else:
        held = routed_experts.num_local_experts
        _compare("routed_experts", "number of physical experts", held, config.num_physical_experts)
        _compare("routed_experts", "computation", routed_experts.computation, ExpertComputation.of(config))


def check_can_be_split(shared_experts: Any, num_ranks: int) -> None:
    """Raise ValueError for a module that cannot be split over so many ranks: each would add the whole of its output."""
    if num_ranks > 1 and not (shared_experts is None or isinstance(shared_experts, SharedExperts)):
        raise ValueError(
            f"shared_experts must be a SharedExperts, which can be split over {num_ranks} ranks, "
            f"got {type(shared_experts).__name__}"
        )


def _compare(part: str, what: str, given: Any, of_config: Any) -> None:
    if given != of_config:
        raise ValueError(
            f"{part} must be built for the layer's config: its {what} is {given}, that of the config {of_config}"
        )
