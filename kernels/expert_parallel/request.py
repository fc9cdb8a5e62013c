"""The validated arguments of the expert-parallel MoE block."""

import dataclasses

from ..fused_moe.request import Request as BlockRequest

Axis = str | tuple[str, ...]
"""Name of a mesh axis, or names of several that count as one, the first one slowest."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Arguments of `expert_parallel_moe` on one rank."""

    block: BlockRequest
    """The rank's tokens with ids of all experts, and the weights of the rank's experts; its `num_experts` counts only these."""
    axis: Axis
    """Mesh axis over which experts, and tokens, are split."""
    num_ranks: int
    """Its size."""
    collective_id: int
    """Of the kernel's barrier."""

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {self.num_ranks}")
        if self.collective_id < 0:
            raise ValueError(f"collective_id must not be negative, got {self.collective_id}")

    @property
    def num_experts(self) -> int:
        """Experts of all ranks."""
        return self.num_ranks * self.block.num_experts

    @property
    def num_pairs(self) -> int:
        """Pairs of a token of this rank and a choice."""
        return self.block.num_tokens * self.block.top_k
