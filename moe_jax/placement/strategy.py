"""Placement strategies: which are legal when, and which one is used."""

from typing import Literal, NamedTuple, get_args

from .ranks import ParallelRanks

PlacementStrategy = Literal["linear", "round_robin"]
"""`linear`: consecutive experts on one rank. `round_robin`: expert `e` on rank `e % ep_size`, so that every rank has
experts of every group."""

BATCHED_BACKENDS = ("deepep_low_latency", "nixl_ep", "padded_all_to_all", "ragged_all_to_all", "remote_dma")
"""Dispatch backends that address experts by physical id through routing tables, and so can follow any placement."""


class PlacementChoice(NamedTuple):
    """A strategy that can be used, and why it is not the one asked for."""

    strategy: PlacementStrategy
    """The strategy to use."""
    reason: str | None
    """Why the request could not be honoured; None: it is."""


def check_strategy(strategy: str) -> None:
    """Raise ValueError unless `strategy` is the name of one."""
    legal = get_args(PlacementStrategy)
    if strategy not in legal:
        raise ValueError(f"placement strategy must be one of {', '.join(legal)}; got {strategy!r}")


def determine_expert_placement_strategy(
    requested: PlacementStrategy,
    ranks: ParallelRanks,
    *,
    num_expert_group: int | None,
    num_redundant_experts: int = 0,
    enable_eplb: bool = False,
    all2all_backend: str = "allgather_reducescatter",
) -> PlacementChoice:
    """The strategy that vLLM uses when asked for `requested`: `round_robin` if all its conditions hold, else `linear`.

    Args:
      requested: strategy asked for.
      ranks: effective parallelism.
      num_expert_group: groups of group-limited routing, None or 1 without.
      num_redundant_experts: physical experts beyond the logical ones.
      enable_eplb: experts move while the model runs.
      all2all_backend: how tokens travel to their experts; matters only where they do.

    Raises:
      ValueError: `requested` is unknown.

    Source: vLLM `determine_expert_placement_strategy`; spec 3.2.
    """
    check_strategy(requested)
    if requested == "linear":
        return PlacementChoice("linear", None)
    unmet = _unmet_round_robin_condition(ranks, num_expert_group, num_redundant_experts, enable_eplb, all2all_backend)
    if unmet is None:
        return PlacementChoice("round_robin", None)
    return PlacementChoice("linear", f"`round_robin` placement needs {unmet}")


def _unmet_round_robin_condition(
    ranks: ParallelRanks,
    num_expert_group: int | None,
    num_redundant_experts: int,
    enable_eplb: bool,
    all2all_backend: str,
) -> str | None:
    if not ranks.use_ep:
        return "expert parallelism, got use_ep=False"
    if num_expert_group is None or num_expert_group <= 1:
        return f"num_expert_group > 1, got {num_expert_group}"
    if num_redundant_experts != 0:
        return f"num_redundant_experts = 0, got {num_redundant_experts}"
    if enable_eplb:
        return "enable_eplb=False, got True"
    if ranks.use_all2all and all2all_backend not in BATCHED_BACKENDS:
        return f"all2all_backend in {', '.join(BATCHED_BACKENDS)}; got {all2all_backend!r}"
    return None
