"""Who sends how many rows to whom, and where they land: from every rank's number of rows per expert.

Experts are placed linearly: rank r owns the experts from `r * E_local` on. A rank's rows for one expert are a *block*, padded to
a multiple of 16 rows, because that is what copies between TPUs can address. Blocks lie

- in the rows that a rank sends, and in the results that come back to it, by expert: blocks for one rank are neighbours;
- in the rows that a rank receives, by expert and then by source: all rows of one expert are neighbours.

How many rows these hold at most depends on shapes alone, and is enough for any routing, so nothing is ever dropped.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..assignment import Assignment
from ..sum_of_choices import sum_of_choices

BLOCK_ALIGNMENT = 16


def most_rows_sent(num_pairs: int, num_experts: int) -> int:
    """Most rows that a rank sends to `num_experts` experts: the padded blocks of that many pairs of a token and a choice."""
    padding = (BLOCK_ALIGNMENT - 1) * min(num_pairs, num_experts)
    return max((num_pairs + padding) // BLOCK_ALIGNMENT, 1) * BLOCK_ALIGNMENT


def most_rows_received(num_pairs: int, num_local_experts: int, num_ranks: int) -> int:
    """Most rows that a rank receives: every rank may send all its pairs to it."""
    return num_ranks * most_rows_sent(num_pairs, num_local_experts)


class SentBlocks(NamedTuple):
    """Where the pairs of this rank's tokens and experts lie among the rows that it sends, and their results when they return."""

    token: Int[Array, "sent"]
    """Token of each row; any for padding."""
    pair: Int[Array, "sent"]
    """Pair (token * K + choice) of each row; any for padding."""
    position: Int[Array, "T K"]
    """Row of each pair; 0 for pairs without an expert."""
    has_expert: Bool[Array, "T K"]
    """Whether a pair's id is one of an expert."""
    block_rows: Int[Array, "E"]
    """Rows of each expert's block, a multiple of 16."""

    @classmethod
    def of(cls, topk_ids: Int[Array, "T K"], num_experts: int) -> Self:
        """Sort pairs by expert, in blocks. Ids outside `[0, num_experts)` are sent nowhere."""
        num_tokens, top_k = topk_ids.shape
        num_pairs = num_tokens * top_k
        assignment = Assignment.of(topk_ids, 0, num_experts)
        starts, sizes = assignment.groups
        block_rows = -(-sizes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        block_ends = jnp.cumsum(block_rows)
        shift = block_ends - block_rows - starts
        has_expert = assignment.is_local(num_experts)
        expert = jnp.minimum(assignment.expert, num_experts - 1)
        position = jnp.where(has_expert, assignment.position + shift[expert], 0)

        row = jnp.arange(most_rows_sent(num_pairs, num_experts), dtype=jnp.int32)
        expert_of_row = jnp.minimum(jnp.sum(row[:, None] >= block_ends, axis=1), num_experts - 1)
        pair = assignment.pair[jnp.clip(row - shift[expert_of_row], 0, num_pairs - 1)]
        return cls(pair // top_k, pair, position, has_expert, block_rows)

    def combine(self, results: Float[Array, "sent H"], topk_weights: Float[Array, "T K"]) -> Float[Array, "T H"]:
        """Weighted sum of each token's results, in the order of its choices and the dtype of the weights."""
        return sum_of_choices(results, self.position, weights=topk_weights, counts=self.has_expert)


class Exchange(NamedTuple):
    """The blocks that one rank sends, and those that it receives; rows count from the start of the array that is meant."""

    send_start: Int[Array, "E"]
    """First row of each expert's block among the rows that this rank sends, and among the results that return to it."""
    send_rows: Int[Array, "E"]
    """Rows of the block."""
    send_target: Int[Array, "E"]
    """First row of the block among the rows that the expert's owner receives."""
    receive_start: Int[Array, "Elocal ranks"]
    """First row of each source's block for each expert of this rank, among the rows that this rank receives."""
    receive_rows: Int[Array, "Elocal ranks"]
    """Rows of the block."""
    return_target: Int[Array, "Elocal ranks"]
    """First row of the block among the results that return to its source."""

    @classmethod
    def of(cls, block_rows: Int[Array, "ranks E"], rank: int | Int[Array, ""]) -> Self:
        """The exchange as `rank` sees it, from all ranks' `SentBlocks.block_rows`."""
        num_ranks, num_experts = block_rows.shape
        num_local = num_experts // num_ranks
        send_starts = _starts(block_rows)
        by_owner = block_rows.reshape(num_ranks, num_ranks, num_local).transpose(
            1, 2, 0
        )  # [owner, local expert, source]
        receive_starts = _starts(by_owner.reshape(num_ranks, -1)).reshape(by_owner.shape)

        def of_rank(values: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
            return jax.lax.dynamic_index_in_dim(values, rank, axis, keepdims=False)

        return cls(
            send_start=of_rank(send_starts, 0),
            send_rows=of_rank(block_rows, 0),
            send_target=of_rank(receive_starts, 2).reshape(-1),
            receive_start=of_rank(receive_starts, 0),
            receive_rows=of_rank(by_owner, 0),
            return_target=of_rank(send_starts.reshape(num_ranks, num_ranks, num_local), 1).T,
        )


def _starts(rows: Int[Array, "lists blocks"]) -> Int[Array, "lists blocks"]:
    """Where each block of each list starts when those before it are laid side by side."""
    return jnp.cumsum(rows, axis=1) - rows
