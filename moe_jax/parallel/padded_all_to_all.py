"""Padded all-to-all: every rank sends every other equally many rows, whether it has that many or not.

The collective is the plain one, which every platform has and runs fast; its price is padding. With `capacity_factor` a rank has
room for so many times what evenly spread choices need from each other rank, and the choices of the last tokens that don't find
room are dropped, and counted. Without, it has room for the worst case.

Source: spec 3.2 and 6 (the batched backends: DeepEP's low-latency kernels, pplx); GShard (arXiv 2006.16668) for the capacity.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel.dispatch import (
    DispatchRequest,
    DispatchSettings,
    LocalExperts,
    ReceivedRows,
    gather_tokens,
    sum_and_scatter_tokens,
    tensor_exchanged,
)
from moe_jax.parallel.outgoing import Outgoing, TokenChoices
from moe_jax.parallel.requirements import unsupported_all_to_all, unsupported_buffer
from moe_jax.parallel.sent_rows import SentRows

NAME = "padded_all_to_all"
SLICES_TOKENS = True
WHY_ONLY_BY_NAME = None


def unsupported(request: DispatchRequest) -> str | None:
    """A buffer for rounds, and what no all-to-all can do."""
    return unsupported_all_to_all(request) or unsupported_buffer(request)


def rows_moved(request: DispatchRequest) -> float:
    """The room of all other ranks, twice."""
    settings = request.settings
    tokens = request.sliced_tokens * request.axes.size(tensor_exchanged(request.axes))
    capacity = settings.capacity(tokens, request.top_k)
    return 2 * capacity * (settings.num_ranks - 1) + request.rows_around_exchange()


def dispatch(
    settings: DispatchSettings, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
) -> tuple[ReceivedRows, Outgoing]:
    """Send `[ranks * capacity, H]` rows with their ids; what was sent is kept for the way back."""
    x, topk_weights, topk_ids = gather_tokens(tensor_exchanged(settings.axes), x, topk_weights, topk_ids)
    choices = TokenChoices.of(settings, topk_weights, topk_ids)
    rows = SentRows.padded(
        jnp.where(choices.carries, choices.owner, settings.num_ranks),
        settings.num_ranks,
        capacity=settings.capacity(*topk_ids.shape),
        most_comparisons=settings.most_comparisons,
    )
    outgoing = Outgoing.of(settings, x, choices, rows)
    if settings.one_row_per_rank:
        ids = topk_ids[rows.pair // topk_ids.shape[1]]
        weights = _exchange(settings, rows.gather(topk_weights))
    else:
        ids = topk_ids.reshape(-1)[rows.pair][:, None]
        weights = jnp.ones((rows.pair.shape[0], 1), topk_weights.dtype)
    received = ReceivedRows(
        x=_exchange(settings, outgoing.x),
        topk_weights=weights,
        topk_ids=_exchange(settings, jnp.where(rows.is_row[:, None], ids, -1)),
        sent_rows=jnp.sum(rows.sizes) - rows.sizes[settings.rank],
        dropped_rows=outgoing.dropped_rows,
        expected_rows=min(topk_ids.size, ids.size),
    )
    return received, outgoing


def send_back(settings: DispatchSettings, results: Float[Array, "R H"], sent: Outgoing) -> Float[Array, "R H"]:
    """Send every row's result back to where the row came from."""
    del sent
    return _exchange(settings, results)


def combine(
    settings: DispatchSettings, returned: Float[Array, "R H"], sent: Outgoing, experts: LocalExperts, after: Any
) -> Float[Array, "T H"]:
    """Sum the results of each token's rows."""
    del experts, after
    return sum_and_scatter_tokens(tensor_exchanged(settings.axes), sent.combine(returned))


def _exchange(settings: DispatchSettings, rows: Array) -> Array:
    """Swap the blocks of equally many rows, one for each rank; doing it twice changes nothing."""
    return jax.lax.all_to_all(rows, settings.axes.expert, 0, 0, tiled=True)
