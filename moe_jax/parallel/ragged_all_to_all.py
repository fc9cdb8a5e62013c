"""Ragged all-to-all: every rank sends every other just the rows that chose its experts.

Nothing is padded and nothing is dropped. The buffer for received rows has the size of the worst case, all tokens of all ranks,
but only rows that exist are sent and computed. Ranks first tell each other how many rows they have for each expert; from these
counts follow all offsets and sizes, and the ids of the rows that arrive.

Source: spec 6 (DeepEP's high-throughput kernels); `jax.lax.ragged_all_to_all`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel.dispatch import (
    DispatchRequest,
    DispatchSettings,
    ReceivedRows,
    gather_tokens,
    rows_per_token,
    sum_and_scatter_tokens,
    tensor_exchanged,
)
from moe_jax.parallel.outgoing import Choices, Outgoing
from moe_jax.parallel.ragged_exchange import RaggedOffsets, exchange, forth_and_back
from moe_jax.parallel.requirements import unsupported_all_to_all, unsupported_capacity
from moe_jax.parallel.sent_rows import SentRows

NAME = "ragged_all_to_all"
SLICES_TOKENS = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedSent:
    """What the way back needs."""

    outgoing: Outgoing
    forth: RaggedOffsets
    back: RaggedOffsets


def unsupported(request: DispatchRequest) -> str | None:
    """A capacity, and what no all-to-all can do."""
    return unsupported_all_to_all(request) or unsupported_capacity(request)


def rows_moved(request: DispatchRequest) -> float:
    """The rows of other ranks' experts, twice; more where XLA replaces the collective by one that moves every row."""
    settings = request.settings
    tokens, ranks = request.sliced_tokens * request.axes.size(tensor_exchanged(request.axes)), settings.num_ranks
    per_token = rows_per_token(request.top_k, ranks, settings.one_row_per_rank)
    forth = back = tokens * per_token * (ranks - 1) / ranks
    if request.axes.platform == "cpu":  # the emulation gathers operands
        forth = (ranks - 1) * _most_sent(settings, tokens, request.top_k)
        back = (ranks - 1) * ranks * settings.most_rows(tokens, request.top_k)
    elif request.axes.platform == "gpu" and (hosts := request.axes.num_hosts) > 1:
        # XLA first swaps all rows, whatever their experts, between hosts, and then sends them where they belong.
        forth = back = _most_sent(settings, tokens, request.top_k) * (hosts - 1 + 1 - hosts / ranks)
    return forth + back + request.rows_around_exchange()


def dispatch(
    settings: DispatchSettings, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
) -> tuple[ReceivedRows, RaggedSent]:
    """Send rows sorted by expert, or by rank; what was sent is kept for the way back."""
    x, topk_weights, topk_ids = gather_tokens(tensor_exchanged(settings.axes), x, topk_weights, topk_ids)
    num_tokens, top_k = topk_ids.shape
    ranks, local_experts = settings.num_ranks, settings.local_experts
    choices = Choices.of(settings, topk_weights, topk_ids)
    destinations = ranks if settings.one_row_per_rank else settings.num_experts
    rows = SentRows.dense(
        jnp.where(choices.carries, choices.key, destinations),
        destinations,
        most_rows=_most_sent(settings, num_tokens, top_k),
        comparisons=settings.comparisons,
    )
    outgoing = Outgoing.of(settings, x, choices, rows)
    counts = jax.lax.all_gather(rows.sizes, settings.axes.expert).reshape(ranks, ranks, -1)
    sizes = counts.sum(axis=2)
    sent = RaggedSent(outgoing, *forth_and_back(sizes, settings.rank))
    num_received = ranks * settings.most_rows(num_tokens, top_k)

    def travel(array: Array) -> Array:
        return exchange(array, sent.forth, sent.back, num_received, settings.axes.expert, settings.axes.platform)

    if settings.one_row_per_rank:
        arrived = jnp.arange(num_received)[:, None] < jnp.sum(sent.forth.recv_sizes)
        ids = jnp.where(arrived, travel(topk_ids[rows.pair // top_k]), -1)
        weights = travel(rows.gather(topk_weights))
    else:
        ids = _ids_of_received(counts[:, settings.rank], settings.rank * local_experts, num_received)[:, None]
        weights = jnp.ones((num_received, 1), topk_weights.dtype)
    received = ReceivedRows(
        x=travel(outgoing.x),
        topk_weights=weights,
        topk_ids=ids,
        sent_rows=jnp.sum(sizes[settings.rank]) - sizes[settings.rank, settings.rank],
        dropped_rows=outgoing.dropped_rows,
        expected_rows=min(topk_ids.size, ids.size),
    )
    return received, sent


def combine(settings: DispatchSettings, results: Float[Array, "R H"], sent: RaggedSent) -> Float[Array, "T H"]:
    """Send every row's result back to where the row came from."""
    num_sent = sent.outgoing.x.shape[0]
    returned = exchange(results, sent.back, sent.forth, num_sent, settings.axes.expert, settings.axes.platform)
    return sum_and_scatter_tokens(tensor_exchanged(settings.axes), sent.outgoing.combine(returned))


def _most_sent(settings: DispatchSettings, num_tokens: int, top_k: int) -> int:
    """Most rows that a rank sends, those that stay with it included."""
    return num_tokens * min(top_k, settings.num_ranks if settings.one_row_per_rank else settings.num_experts)


def _ids_of_received(
    counts: Int[Array, "ranks local"], first_expert: Int[Array, ""] | int, num_received: int
) -> Int[Array, "received"]:
    """Physical ids of the rows that arrive by source, and from each source by expert; -1 behind the last one."""
    ends = jnp.cumsum(counts.reshape(-1))
    block = jnp.sum(jnp.arange(num_received, dtype=jnp.int32)[:, None] >= ends, axis=1, dtype=jnp.int32)
    return jnp.where(block < ends.shape[0], first_expert + block % counts.shape[1], -1)
