"""Replicated tokens: each rank computes its share of the experts for the tokens it has, and shares are summed.

Nothing is dispatched. A rank runs the experts of its expert position, each cut to its slice of the intermediate size; the sum
over the ranks, which hold the same tokens, is the layer's output. Tokens may be split over data axes that split no experts.

Source: spec 1.4, 1.8; vLLM's tensor- and expert-parallel path without all-to-all kernels.
"""

from typing import Any

from jaxtyping import Array, Float, Int

from moe_jax.parallel.dispatch import DispatchRequest, DispatchSettings, LocalExperts, ReceivedRows, no_rows
from moe_jax.parallel.requirements import unsupported_all_to_all_options

NAME = "replicated"
SLICES_TOKENS = False
WHY_ONLY_BY_NAME = None


def unsupported(request: DispatchRequest) -> str | None:
    """Ranks that hold different tokens and different experts, and everything that speaks of rows on their way."""
    if names := request.axes.exchanged:
        return (
            "it needs every token on all ranks among which the experts are split, so tokens must not be split over "
            f"an axis that splits experts, got {', '.join(map(repr, names))}"
        )
    if request.parallel.micro_batches > 1:
        return f"it dispatches nothing that could overlap, so micro_batches must be 1, got {request.parallel.micro_batches}"
    return unsupported_all_to_all_options(request)


def rows_moved(request: DispatchRequest) -> float:
    """The sum over ranks, as a reduce-scatter and an all-gather."""
    ranks = request.axes.num_ranks
    return 2 * request.local_tokens * (ranks - 1) / ranks


def dispatch(
    settings: DispatchSettings, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
) -> tuple[ReceivedRows, tuple[()]]:
    """All tokens are here."""
    expected_rows = settings.share_of(topk_ids.size)
    return ReceivedRows(x, topk_weights, topk_ids, no_rows(), no_rows(), expected_rows), ()


def send_back(settings: DispatchSettings, results: Float[Array, "T H"], sent: tuple[()]) -> Float[Array, "T H"]:
    """They are where their tokens are."""
    del settings, sent
    return results


def combine(
    settings: DispatchSettings, returned: Float[Array, "T H"], sent: tuple[()], experts: LocalExperts, after: Any
) -> Float[Array, "T H"]:
    """Each token has one result."""
    del settings, sent, experts, after
    return returned
