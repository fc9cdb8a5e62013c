"""Where one rank stands among all: how vLLM turns tensor, data and context parallelism into expert parallelism."""

import dataclasses
from typing import Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelRanks:
    """The effective parallelism of a MoE layer, seen from one rank (spec 1.8).

    Without expert parallelism every expert is cut into `tp_size` slices; with it every expert is whole, on one of
    `ep_size` ranks.
    """

    tp_size: int = 1
    """Ranks among which each expert is sliced."""
    tp_rank: int = 0
    """This rank's place among them."""
    ep_size: int = 1
    """Ranks among which the experts are dealt out."""
    ep_rank: int = 0
    """This rank's place among them."""
    dp_size: int = 1
    """Ranks that hold different tokens."""
    pcp_size: int = 1
    """Ranks that hold different parts of a prompt (prefill context parallelism)."""
    sp_size: int = 1
    """Ranks that hold different parts of the sequence inside the layer."""
    use_ep: bool = False
    """Expert parallelism is on."""

    def __post_init__(self) -> None:
        for kind in ("tp", "ep", "dp", "pcp", "sp"):
            _check_size(f"{kind}_size", getattr(self, f"{kind}_size"))
        for kind in ("tp", "ep"):
            _check_rank(f"{kind}_rank", getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size"))
        if self.ep_size > 1 and not self.use_ep:
            raise ValueError(f"ep_size must be 1 when use_ep=False, got {self.ep_size}")

    @classmethod
    def from_vllm(
        cls,
        tp: int = 1,
        dp: int = 1,
        enable_ep: bool = False,
        *,
        pcp: int = 1,
        tp_rank: int = 0,
        dp_rank: int = 0,
        pcp_rank: int = 0,
        sequence_parallel: bool = False,
    ) -> Self:
        """What vLLM's `FusedMoEParallelConfig.make` makes of these sizes, for one rank.

        All ranks are flattened in the order data, context, tensor; the flat group is the expert-parallel one if
        `enable_ep`, and the tensor-parallel one otherwise.

        Args:
            tp: tensor-parallel size; the ranks of one such group hold the same tokens.
            dp: data-parallel size; ranks hold different tokens.
            enable_ep: whole experts on each rank, instead of a slice of every expert; nothing to do for one rank.
            pcp: prefill-context-parallel size; ranks hold different parts of a prompt.
            tp_rank: this rank's place in the tensor-parallel group.
            dp_rank: this rank's place among those with different tokens.
            pcp_rank: this rank's place among those with different parts of a prompt.
            sequence_parallel: the tensor-parallel ranks hold different parts of the sequence inside the layer.

        Raises:
            ValueError: a size is not positive, or a rank lies outside its group.
        """
        for name, rank, size in (("tp", tp_rank, tp), ("dp", dp_rank, dp), ("pcp", pcp_rank, pcp)):
            _check_size(name, size)
            _check_rank(f"{name}_rank", rank, size)
        flat_size = dp * pcp * tp
        flat_rank = (dp_rank * pcp + pcp_rank) * tp + tp_rank
        use_ep = enable_ep and flat_size > 1
        return cls(
            tp_size=1 if use_ep else flat_size,
            tp_rank=0 if use_ep else flat_rank,
            ep_size=flat_size if use_ep else 1,
            ep_rank=flat_rank if use_ep else 0,
            dp_size=dp,
            pcp_size=pcp,
            sp_size=tp if sequence_parallel else 1,
            use_ep=use_ep,
        )

    @property
    def use_all2all(self) -> bool:
        """Tokens must travel to the experts' ranks, because ranks hold different tokens."""
        return self.use_ep and (self.dp_size > 1 or self.pcp_size > 1 or self.sp_size > 1)


def slots_per_rank(num_slots: int, num_ranks: int) -> int:
    """Physical slots of each rank.

    Raises:
        ValueError: slots that cannot be split over the ranks.
    """
    if num_ranks < 1 or num_slots % num_ranks:
        raise ValueError(f"the number of ranks must divide the {num_slots} physical slots, got {num_ranks}")
    return num_slots // num_ranks


def _check_size(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name} must be positive, got {size}")


def _check_rank(name: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"{name} must be in [0, {size}), got {rank}")
