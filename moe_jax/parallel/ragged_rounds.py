"""Rounds of the ragged all-to-all: a buffer full of rows comes, is computed, and goes back; then the next.

The first round is an ordinary part of the program, so that other work can overlap with it. The others, which unevenly spread
choices need, are a loop of as many rounds as the busiest rank has rows for.
"""

import dataclasses
import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.experts.routed import ExpertComputation
from moe_jax.experts.weights import ExpertWeights
from moe_jax.kernels.sum_of_rounds import sum_of_rounds
from moe_jax.parallel.dispatch import DispatchSettings, LocalExperts, ReceivedRows, no_rows
from moe_jax.parallel.ragged_exchange import exchange, forth_and_back


class TravellingRows(NamedTuple):
    """What a rank sends: rows for one expert, which the counts tell, or for every expert of a rank."""

    x: Float[Array, "R H"]
    topk_weights: Float[Array, "R K"] | None
    """None: the result is weighted where the row came from."""
    topk_ids: Int[Array, "R K"] | None


@dataclasses.dataclass(frozen=True)
class RaggedRounds:
    """How rows travel: static under `jax.jit`."""

    settings: DispatchSettings
    num_rows: int
    """Most rows that a rank receives in one round."""
    most_received: int
    """Most rows that a rank can receive in all."""
    most_sent: int
    """Most rows that a rank can send in all."""
    expected_rows: int
    """See `ReceivedRows`."""

    @classmethod
    def of(cls, settings: DispatchSettings, num_tokens: int, top_k: int) -> Self:
        """Rounds for `num_tokens` tokens on each rank."""
        num_rows = settings.buffer_rows(num_tokens, top_k)
        most_sent = num_tokens * min(top_k, settings.num_ranks if settings.one_row_per_rank else settings.num_experts)
        most_received = settings.num_ranks * settings.most_rows(num_tokens, top_k)
        # A rank's share of all choices, as far as a round has room for it; a quotient of floats may be a little too large.
        share = num_tokens * top_k * min(1.0, num_rows / max(1, settings.even_rows(num_tokens, top_k)))
        expected_rows = min(math.ceil(share), num_rows * (top_k if settings.one_row_per_rank else 1))
        return cls(settings, num_rows, most_received, most_sent, expected_rows)

    def receive(
        self, number: Int[Array, ""] | int, rows: TravellingRows, counts: Int[Array, "ranks ranks n"]
    ) -> ReceivedRows:
        """The rows of one round: as many as there is room for, the sources' one after the other.

        Args:
            number: of the round, from 0.
            rows: of this rank.
            counts: rows that each rank (first axis) has for each rank, by expert if a row is for one expert.
        """
        settings = self.settings
        first_expert = settings.rank * settings.local_experts
        sizes = counts.sum(axis=2)
        forth, back = self._offsets(number, counts)

        def travel(array: Array) -> Array:
            return exchange(array, forth, back, self.num_rows, settings.axes.expert, settings.axes.platform)

        if rows.topk_weights is None or rows.topk_ids is None:
            row = number * self.num_rows + jnp.arange(self.num_rows, dtype=jnp.int32)
            topk_ids = _ids_of_received(counts[:, settings.rank], first_expert, row)[:, None]
            topk_weights = jnp.ones(topk_ids.shape, jnp.float32)
        else:
            has_arrived = jnp.arange(self.num_rows)[:, None] < jnp.sum(forth.recv_sizes)
            topk_ids = travel(rows.topk_ids) - first_expert
            # Ids of other ranks must not pass for those of shared experts, which may stand behind this rank's own.
            is_local = has_arrived & (topk_ids >= 0) & (topk_ids < settings.local_experts)
            topk_ids = jnp.where(is_local, first_expert + topk_ids, -1)
            topk_weights = travel(rows.topk_weights)
        return ReceivedRows(
            x=travel(rows.x),
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            sent_rows=jnp.sum(sizes[settings.rank]) - sizes[settings.rank, settings.rank],
            dropped_rows=no_rows(),
            expected_rows=self.expected_rows,
        )

    def send_back(
        self, number: Int[Array, ""] | int, results: Float[Array, "B H"], counts: Int[Array, "ranks ranks n"]
    ) -> Float[Array, "R H"]:
        """The results of one round where their rows came from, and zeros for rows of other rounds."""
        axes = self.settings.axes
        forth, back = self._offsets(number, counts)
        return exchange(results, back, forth, self.most_sent, axes.expert, axes.platform)

    def with_further_results(
        self,
        first_results: Float[Array, "R H"],
        rows: TravellingRows,
        counts: Int[Array, "ranks ranks n"],
        experts: LocalExperts,
    ) -> Float[Array, "R H"]:
        """The results of all rounds where their rows came from, given those of the first one."""
        num_rounds = -(-jnp.max(jnp.sum(counts, axis=(0, 2))) // self.num_rows)
        # Ranks that exchange no rows with these may need fewer rounds. All take part in all of them, so that devices never
        # disagree about which collective is next.
        num_rounds = jax.lax.pmax(num_rounds, self.settings.axes.mesh.axis_names)
        weights = experts.weights
        constants = rows.topk_ids, counts, weights.layer
        variables = rows._replace(topk_ids=None), weights._replace(layer=None)
        return sum_of_rounds(_FurtherRound(self, experts.compute), num_rounds, constants, variables, first_results)

    def _offsets(self, number, counts):
        return forth_and_back(counts.sum(axis=2), self.settings.rank, number * self.num_rows, self.num_rows)


@dataclasses.dataclass(frozen=True)
class _FurtherRound:
    """A term of `sum_of_rounds`."""

    rounds: RaggedRounds
    compute: ExpertComputation

    def __call__(
        self,
        number: Int[Array, ""],
        constants: tuple[Int[Array, "R K"] | None, Int[Array, "ranks ranks n"], Int[Array, ""] | None],
        variables: tuple[TravellingRows, ExpertWeights],
    ) -> Float[Array, "R H"]:
        topk_ids, counts, layer = constants
        rows, weights = variables
        received = self.rounds.receive(number, rows._replace(topk_ids=topk_ids), counts)
        experts = LocalExperts(self.rounds.settings, self.compute, weights._replace(layer=layer))
        return self.rounds.send_back(number, experts(received), counts)


def _ids_of_received(
    counts: Int[Array, "ranks local"], first_expert: Int[Array, ""] | int, row: Int[Array, "rows"]
) -> Int[Array, "rows"]:
    """Physical ids of rows among those that arrive by source, and from each source by expert; -1 behind the last one."""
    ends = jnp.cumsum(counts.reshape(-1))
    block = jnp.sum(row[:, None] >= ends, axis=1, dtype=jnp.int32)
    return jnp.where(block < ends.shape[0], first_expert + block % counts.shape[1], -1)
