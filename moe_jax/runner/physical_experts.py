"""Which expert each slot of a layer holds at the start: from mesh axes, placement strategy and redundant experts."""

import numpy as np
from jax.sharding import Mesh

from moe_jax.config import MoEConfig, ParallelConfig
from moe_jax.experts.replicas import ReplicaMap, initial_physical_to_logical
from moe_jax.parallel import LayerAxes
from moe_jax.parallel.choice import STRATEGIES
from moe_jax.placement import ExpertMapManager, ParallelRanks


def resolve_axes(config: MoEConfig, mesh: Mesh | None) -> LayerAxes | None:
    """The layer's axes on `mesh`, or None without a mesh."""
    if mesh is not None:
        return LayerAxes.resolve(config.parallel, mesh)
    parallel = config.parallel
    if any((parallel.expert_axis, parallel.tensor_axis, parallel.data_axis, parallel.sequence_axis)):
        raise ValueError(f"a layer with parallel axes needs mesh=, got None with {parallel}")
    ignored = [
        f"{name}={getattr(parallel, name)!r}"
        for name in ("strategy", "capacity_factor", "buffer_factor", "one_row_per_rank", "micro_batches")
        if getattr(parallel, name) != getattr(ParallelConfig(), name)
    ]
    if ignored:
        raise ValueError(f"a layer that dispatches tokens needs mesh=, got None with {', '.join(ignored)}")
    return None


def expert_map_manager(config: MoEConfig, axes: LayerAxes | None, ep_rank: int = 0) -> ExpertMapManager:
    """Placement as upstream decides it for the ranks at position `ep_rank` of the expert axes; without axes, of one rank.

    Raises:
        ValueError: `config.parallel.placement_strategy` cannot hold; says why.
    """
    parallel, groups = config.parallel, config.router.group_limit
    # Where the strategy is chosen for each number of tokens, it is one of those that follow any placement.
    backend = "padded_all_to_all" if parallel.strategy is None else parallel.strategy
    slices = any(strategy.SLICES_TOKENS for strategy in STRATEGIES if parallel.strategy == strategy.NAME)
    ep_size = 1 if axes is None else axes.size(axes.expert)
    return ExpertMapManager(
        global_num_experts=config.num_physical_experts,
        ranks=ParallelRanks(
            ep_size=ep_size,
            ep_rank=ep_rank,
            tp_size=1 if axes is None else axes.size(axes.tensor),
            dp_size=1 if axes is None else axes.size(axes.tokens),
            sp_size=axes.size(axes.sliced) if axes is not None and slices else 1,
            use_ep=ep_size > 1,
        ),
        placement_strategy=parallel.placement_strategy,
        num_expert_group=None if groups is None else groups.num_groups,
        num_redundant_experts=config.num_redundant_experts,
        all2all_backend=backend,
        num_fused_shared_experts=config.num_fused_shared_experts,
    )


def initial_placement(config: MoEConfig, axes: LayerAxes | None) -> np.ndarray:
    """The logical expert in each physical slot, `[P]` int32; slots count through the first rank's, then the second's, and so on."""
    ep_size = 1 if axes is None else axes.size(axes.expert)
    slots = [expert_map_manager(config, axes, rank).get_local_expert_ids() for rank in range(ep_size)]
    return initial_physical_to_logical(config.num_experts, config.num_redundant_experts)[np.concatenate(slots)]


def initial_replicas(config: MoEConfig, axes: LayerAxes | None) -> ReplicaMap | None:
    """Tables from logical to physical ids, or None where they are the same."""
    placement = initial_placement(config, axes)
    if np.array_equal(placement, np.arange(config.num_experts)):
        return None
    return ReplicaMap(placement, config.num_experts)
