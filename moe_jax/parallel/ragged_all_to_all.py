"""Ragged all-to-all: every rank sends every other just the rows that chose its experts.

Nothing is padded and nothing is dropped. Ranks first tell each other how many rows they have for each expert; from these counts
follow all offsets and sizes, and the ids of the rows that arrive.

A rank receives at most a buffer full of rows at once, computes them and sends their results back; if more rows chose its experts,
further rounds follow. So memory is bounded, however many ranks there are, and evenly spread choices take one round.

Source: spec 6 (DeepEP's high-throughput kernels); `jax.lax.ragged_all_to_all`.
"""

import dataclasses
import math
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
    rows_per_token,
    sum_and_scatter_tokens,
    tensor_exchanged,
)
from moe_jax.parallel.outgoing import Outgoing, TokenChoices
from moe_jax.parallel.ragged_rounds import RaggedRounds, TravellingRows
from moe_jax.parallel.requirements import unsupported_all_to_all, unsupported_capacity
from moe_jax.parallel.sent_rows import SentRows

NAME = "ragged_all_to_all"
SLICES_TOKENS = True
WHY_ONLY_BY_NAME = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedSent:
    """What further rounds and the way back need."""

    outgoing: Outgoing
    rows: TravellingRows
    counts: Int[Array, "ranks ranks n"]
    """Rows that each rank (first axis) has for each rank, by expert if a row is for one expert."""
    rounds: RaggedRounds = dataclasses.field(metadata={"static": True})


def unsupported(request: DispatchRequest) -> str | None:
    """A capacity, and what no all-to-all can do."""
    return unsupported_all_to_all(request) or unsupported_capacity(request)


def rows_moved(request: DispatchRequest) -> float:
    """The rows of other ranks' experts, twice; more where XLA replaces the collective by one that moves every row."""
    settings = request.settings
    tokens, ranks = request.sliced_tokens * request.axes.size(tensor_exchanged(request.axes)), settings.num_ranks
    forth = back = tokens * rows_per_token(request.top_k, ranks, settings.one_row_per_rank) * (ranks - 1) / ranks
    rounds = RaggedRounds.of(settings, tokens, request.top_k)
    num_rounds = math.ceil(settings.even_rows(tokens, request.top_k) / rounds.num_rows)
    if request.axes.platform == "cpu":  # the emulation gathers operands
        forth, back = ((ranks - 1) * num_rounds * most for most in (rounds.most_sent, rounds.num_rows))
    elif request.axes.platform == "gpu" and (hosts := request.axes.num_hosts) > 1:
        # XLA first swaps all rows, whatever their experts, between hosts, and then sends them where they belong.
        forth = back = num_rounds * rounds.most_sent * (hosts - 1 + 1 - hosts / ranks)
    return forth + back + request.rows_around_exchange()


def dispatch(
    settings: DispatchSettings, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
) -> tuple[ReceivedRows, RaggedSent]:
    """Send rows sorted by expert, or by rank, in a first round; what was sent is kept for others and for the way back."""
    x, topk_weights, topk_ids = gather_tokens(tensor_exchanged(settings.axes), x, topk_weights, topk_ids)
    num_tokens, top_k = topk_ids.shape
    rounds = RaggedRounds.of(settings, num_tokens, top_k)
    choices = TokenChoices.of(settings, topk_weights, topk_ids)
    destinations = settings.num_ranks if settings.one_row_per_rank else settings.num_experts
    order = SentRows.dense(
        jnp.where(choices.carries, choices.key, destinations),
        destinations,
        most_rows=rounds.most_sent,
        most_comparisons=settings.most_comparisons,
    )
    outgoing = Outgoing.of(settings, x, choices, order)
    rows = TravellingRows(outgoing.x, None, None)
    if settings.one_row_per_rank:
        rows = TravellingRows(outgoing.x, order.gather(topk_weights), topk_ids[order.pair // top_k])
    counts = jax.lax.all_gather(order.sizes, settings.axes.expert)
    counts = counts.reshape(settings.num_ranks, settings.num_ranks, -1)
    received = dataclasses.replace(rounds.receive(0, rows, counts), dropped_rows=outgoing.dropped_rows)
    return received, RaggedSent(outgoing, rows, counts, rounds)


def send_back(settings: DispatchSettings, results: Float[Array, "R H"], sent: RaggedSent) -> Float[Array, "S H"]:
    """Send the result of every row of the first round back to where the row came from."""
    del settings
    return sent.rounds.send_back(0, results, sent.counts)


def combine(
    settings: DispatchSettings, returned: Float[Array, "S H"], sent: RaggedSent, experts: LocalExperts, after: Any
) -> Float[Array, "T H"]:
    """Let the rows of further rounds follow, and sum the results of each token's rows."""
    rounds = sent.rounds
    if rounds.num_rows < rounds.most_received:
        rows, _ = jax.lax.optimization_barrier((sent.rows, after))
        returned = rounds.with_further_results(returned, rows, sent.counts, experts)
    return sum_and_scatter_tokens(tensor_exchanged(settings.axes), sent.outgoing.combine(returned))
