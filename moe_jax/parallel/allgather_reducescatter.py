"""All-gather and reduce-scatter: every rank gets all tokens, runs its experts on them, and gives each rank its sums.

Moves every token to every rank, whatever it chose: for few ranks and many choices per token not much more than necessary, in the
two collectives that are fast everywhere. Where ranks hold the same tokens, their results stay partial, as with `replicated`.

Source: vLLM's default backend of this name; spec 6.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel.dispatch import (
    DispatchRequest,
    DispatchSettings,
    LocalExperts,
    ReceivedRows,
    gather_tokens,
    no_rows,
    sum_and_scatter_tokens,
)
from moe_jax.parallel.requirements import unsupported_all_to_all_options

NAME = "allgather_reducescatter"
SLICES_TOKENS = False
WHY_ONLY_BY_NAME = None


def unsupported(request: DispatchRequest) -> str | None:
    """Only options of all-to-all strategies are."""
    return unsupported_all_to_all_options(request)


def rows_moved(request: DispatchRequest) -> float:
    """All tokens of a rank to all others, and as many partial results; the sum over ranks with the same tokens."""
    gathered, ranks = request.axes.size(request.axes.exchanged), request.axes.num_ranks
    return request.local_tokens * (2 * (gathered - 1) + 2 * (ranks - 1) / ranks)


def dispatch(
    settings: DispatchSettings, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
) -> tuple[ReceivedRows, tuple[()]]:
    """Gather the tokens of all ranks, with their choices; nothing has to be remembered."""
    names = settings.axes.exchanged
    sent = x.shape[0] * (settings.axes.size(names) - 1)
    x, topk_weights, topk_ids = gather_tokens(names, x, topk_weights, topk_ids)
    expected_rows = settings.share_of(topk_ids.size)
    return ReceivedRows(x, topk_weights, topk_ids, jnp.full((), sent, jnp.int32), no_rows(), expected_rows), ()


def send_back(settings: DispatchSettings, results: Float[Array, "R H"], sent: tuple[()]) -> Float[Array, "T H"]:
    """Sum the ranks' results, each rank getting those of its tokens."""
    del sent
    return sum_and_scatter_tokens(settings.axes.exchanged, results)


def combine(
    settings: DispatchSettings, returned: Float[Array, "T H"], sent: tuple[()], experts: LocalExperts, after: Any
) -> Float[Array, "T H"]:
    """They are summed already."""
    del settings, sent, experts, after
    return returned
