"""`ExpertMapManager`: everything about which expert lives where, for one rank."""

import dataclasses
from typing import Self

import numpy as np

from .expert_map import determine_expert_map
from .ranks import ParallelRanks
from .routing_tables import RoutingTables, build_routing_tables
from .strategy import BATCHED_BACKENDS, PlacementChoice, PlacementStrategy, determine_expert_placement_strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertMapManager:
    """Expert map, mask, placement strategy and routing tables of one rank, all derived when built (spec 3.3).

    Immutable: `update` returns a new manager with every table rebuilt, so nothing can be stale, and topologies may
    change in any direction (1 rank to many included). Tables are static, read-only numpy arrays.

    Raises:
        ValueError: no expert at all, a number of redundant or fused shared experts that is out of range, an unknown strategy,
            or a `placement_strategy` asked for by name that cannot hold; the message carries the unmet condition.
    """

    global_num_experts: int
    """Routed physical experts of the whole model: logical ones and their redundant copies."""
    ranks: ParallelRanks = ParallelRanks()
    """Effective parallelism and this rank's place in it."""
    placement_strategy: PlacementStrategy | None = None
    """How experts are dealt out. A strategy that cannot hold raises; None becomes `round_robin` where that can hold and
    `linear` elsewhere, also after an `update`. Once built, this is the strategy in use."""
    num_expert_group: int | None = None
    """Groups of group-limited routing."""
    num_redundant_experts: int = 0
    """How many of `global_num_experts` are copies."""
    enable_eplb: bool = False
    """Experts move while the model runs."""
    all2all_backend: str = "allgather_reducescatter"
    """How tokens travel to their experts."""
    num_fused_shared_experts: int = 0
    """Shared experts computed as extra experts of every rank."""
    with_expert_mask: bool = False
    """Derive `expert_mask`, too, and let `expert_map` cover the fused shared experts."""

    placement_reason: str | None = dataclasses.field(init=False, compare=False, repr=False)
    """Why `placement_strategy=None` became `linear`; None otherwise."""
    local_num_experts: int = dataclasses.field(init=False, compare=False)
    """Experts on this rank, fused shared ones included."""
    expert_map: np.ndarray | None = dataclasses.field(init=False, compare=False, repr=False)
    """int32 `[global]`: local index of each expert, -1 where it lives elsewhere; None: all are local."""
    expert_mask: np.ndarray | None = dataclasses.field(init=False, compare=False, repr=False)
    """int32 `[global + fused shared + 1]`: 1 where the expert is local; None on one rank, or without
    `with_expert_mask`."""
    routing_tables: RoutingTables | None = dataclasses.field(init=False, compare=False, repr=False)
    """Slots under round-robin placement; None where dispatch needs no such tables."""
    _asked_strategy: PlacementStrategy | None = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.num_redundant_experts < self.global_num_experts:
            raise ValueError(
                f"num_redundant_experts must be in [0, global_num_experts={self.global_num_experts}), "
                f"got {self.num_redundant_experts}"
            )
        asked = self.placement_strategy
        choice = determine_expert_placement_strategy(
            "round_robin" if asked is None else asked,
            self.ranks,
            num_expert_group=self.num_expert_group,
            num_redundant_experts=self.num_redundant_experts,
            enable_eplb=self.enable_eplb,
            all2all_backend=self.all2all_backend,
        )
        if choice.strategy == "round_robin" and self._addresses_slots and self.num_fused_shared_experts:
            choice = PlacementChoice(
                "linear",
                f"`round_robin` placement with all2all_backend={self.all2all_backend!r} needs "
                f"num_fused_shared_experts = 0, got {self.num_fused_shared_experts}",
            )
        if asked is not None and choice.reason is not None:
            raise ValueError(choice.reason)
        local_routed, expert_map, expert_mask = determine_expert_map(
            self.ranks.ep_size,
            self.ranks.ep_rank,
            self.global_num_experts,
            choice.strategy,
            self.num_fused_shared_experts,
            return_expert_mask=self.with_expert_mask,
        )
        derived = {
            "_asked_strategy": asked,
            "placement_strategy": choice.strategy,
            "placement_reason": choice.reason,
            "local_num_experts": local_routed + self.num_fused_shared_experts,
            "expert_map": expert_map,
            "expert_mask": expert_mask,
            "routing_tables": self._build_routing_tables(choice.strategy),
        }
        for table in (expert_map, expert_mask, *(derived["routing_tables"] or ())):
            if table is not None:
                table.flags.writeable = False
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the one place that fills a frozen instance

    @property
    def _addresses_slots(self) -> bool:
        """Tokens travel to slots, which routing tables translate; these know no fused shared experts."""
        return self.ranks.use_all2all and self.all2all_backend in BATCHED_BACKENDS

    def _build_routing_tables(self, strategy: PlacementStrategy) -> RoutingTables | None:
        if strategy != "round_robin" or not self._addresses_slots:
            return None
        return build_routing_tables(self.ranks.ep_size, self.ranks.ep_rank, self.global_num_experts)

    def update(
        self,
        *,
        ranks: ParallelRanks | None = None,
        global_num_experts: int | None = None,
        num_redundant_experts: int | None = None,
    ) -> Self:
        """The manager of a new topology; what is not given stays. Every table is rebuilt.

        Raises:
          ValueError: an explicitly requested strategy cannot hold any more.
        """
        return dataclasses.replace(
            self,
            placement_strategy=self._asked_strategy,
            ranks=self.ranks if ranks is None else ranks,
            global_num_experts=self.global_num_experts if global_num_experts is None else global_num_experts,
            num_redundant_experts=self.num_redundant_experts
            if num_redundant_experts is None
            else num_redundant_experts,
        )

    def map_global_to_local(self, global_id: int) -> int:
        """Local index of a routed expert, -1 where it lives elsewhere.

        Raises:
          ValueError: there is no such expert.
        """
        if not 0 <= global_id < self.global_num_experts:
            raise ValueError(f"expert id must be in [0, {self.global_num_experts}), got {global_id}")
        return global_id if self.expert_map is None else int(self.expert_map[global_id])

    def is_local_expert(self, global_id: int) -> bool:
        """Whether this rank holds the routed expert.

        Raises:
          ValueError: there is no such expert.
        """
        return self.map_global_to_local(global_id) >= 0

    def get_local_expert_ids(self) -> list[int]:
        """Global ids of this rank's routed experts, in the order of their local indices."""
        if self.expert_map is None:
            return list(range(self.global_num_experts))
        # Whatever the strategy, local indices follow the order of the ids.
        return np.flatnonzero(self.expert_map[: self.global_num_experts] >= 0).tolist()

    def get_compressed_map_string(self) -> str:
        """The map for logs: `"0->1, 1->5"` (local to global), or `"[0..7]"` where all experts are local."""
        if self.expert_map is None:
            return f"[0..{self.global_num_experts - 1}]"
        return ", ".join(f"{local}->{expert}" for local, expert in enumerate(self.get_local_expert_ids()))
