"""What every dispatch strategy is made of: a request to choose by, settings to run with, and the rows that arrive.

A strategy is a module with the names of `Strategy`. Its `dispatch` brings the rows of tokens to the ranks whose experts they
chose; each rank runs its own experts on what has arrived; `send_back` brings the results back, and `combine` sums them.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig, ParallelConfig
from moe_jax.experts.routed import ExpertComputation
from moe_jax.experts.weights import ExpertWeights
from moe_jax.kernels.assignment import MOST_COMPARISONS
from moe_jax.kernels.sum_of_rounds import rows_worth_a_round
from moe_jax.parallel.axes import LayerAxes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReceivedRows:
    """What a rank's experts have to compute, and what it cost to bring it there."""

    x: Float[Array, "R H"]
    """Rows; any where every id is -1."""
    topk_weights: Float[Array, "R k"]
    """What each row's choices count; any where the id is of another rank's expert."""
    topk_ids: Int[Array, "R k"]
    """Physical ids of each row's choices, those of other ranks' experts and -1 among them."""
    sent_rows: Int[Array, ""]
    """Rows that this rank has sent to other ranks."""
    dropped_rows: Int[Array, ""]
    """Choices of this rank's tokens that found no room."""
    expected_rows: int = dataclasses.field(metadata={"static": True})
    """About how many of the R * k choices name an expert of this rank: as many as if every expert is as likely as any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchSettings:
    """How rows travel: hashable, so that it can be a static argument under `jax.jit`."""

    axes: LayerAxes
    """Axes of the layer."""
    num_experts: int
    """Physical experts of all ranks; rank r owns those from `r * num_experts / ranks` on."""
    capacity_factor: float | None = None
    """See `ParallelConfig`."""
    buffer_factor: float | None = None
    """See `ParallelConfig`."""
    one_row_per_rank: bool = False
    """See `ParallelConfig`."""
    weights_on_input: bool = False
    """The experts' input is multiplied by the router weight, not their output."""

    @property
    def num_ranks(self) -> int:
        """Ranks among which the experts are dealt out."""
        return self.axes.size(self.axes.expert)

    @property
    def local_experts(self) -> int:
        """Experts of each rank."""
        return self.num_experts // self.num_ranks

    @property
    def rank(self) -> Array | int:
        """Inside `jax.shard_map`: this device's rank among them."""
        return self.axes.position(self.axes.expert)

    @property
    def most_comparisons(self) -> int:
        """Up to which all pairs are compared with all: that takes less time than a sort."""
        return MOST_COMPARISONS.get(self.axes.platform, 0)

    def share_of(self, num_choices: int) -> int:
        """How many of all ranks' choices name an expert of one rank, if every expert is as likely as any."""
        return math.ceil(num_choices / self.num_ranks)

    def most_rows(self, num_tokens: int, top_k: int) -> int:
        """Most rows that `num_tokens` tokens can have for one rank."""
        return num_tokens if self.one_row_per_rank else num_tokens * min(top_k, self.local_experts)

    def capacity(self, num_tokens: int, top_k: int) -> int:
        """Rows that a rank has room for from each rank with `num_tokens` tokens."""
        most = self.most_rows(num_tokens, top_k)
        if self.capacity_factor is None:
            return most
        return min(most, math.ceil(self.capacity_factor * self.even_rows(num_tokens, top_k) / self.num_ranks))

    def buffer_rows(self, num_tokens: int, top_k: int) -> int:
        """Rows that a rank receives in one round from all ranks, each with `num_tokens` tokens."""
        most = self.num_ranks * self.most_rows(num_tokens, top_k)
        even = self.even_rows(num_tokens, top_k)
        if self.buffer_factor is None:
            rows = rows_worth_a_round(even, self.local_experts)
        else:
            rows = self.buffer_factor * even
        return max(1, min(most, math.ceil(rows)))

    def even_rows(self, num_tokens: int, top_k: int) -> float:
        """Rows that evenly spread choices of `num_tokens` tokens per rank bring each rank."""
        return num_tokens * rows_per_token(top_k, self.num_ranks, self.one_row_per_rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchRequest:
    """What the choice of a strategy depends on: nothing that is known only while the layer runs."""

    axes: LayerAxes
    """Axes of the layer."""
    config: MoEConfig
    """Of the layer; its `parallel` is what was asked for."""
    num_tokens: int
    """Tokens of all ranks."""

    @property
    def parallel(self) -> ParallelConfig:
        """What was asked for."""
        return self.config.parallel

    @property
    def top_k(self) -> int:
        """Choices per token."""
        return self.config.top_k

    @property
    def settings(self) -> DispatchSettings:
        """The settings that an all-to-all strategy would run with."""
        return DispatchSettings(
            axes=self.axes,
            num_experts=self.config.num_physical_experts,
            capacity_factor=self.parallel.capacity_factor,
            buffer_factor=self.parallel.buffer_factor,
            one_row_per_rank=self.parallel.one_row_per_rank,
        )

    @property
    def local_tokens(self) -> int:
        """Tokens of one rank."""
        return -(-self.num_tokens // self.axes.size(self.axes.tokens))

    @property
    def sliced_tokens(self) -> int:
        """Tokens of one rank after those that several ranks hold have been divided among them."""
        return -(-self.num_tokens // self.axes.size(self.axes.tokens + self.axes.sliced))

    def rows_around_exchange(self) -> float:
        """Rows that a rank of an all-to-all strategy sends besides those of tokens on their way to experts and back.

        Gathering the slices of tokens that several ranks hold, and what tensor axes need.
        """
        axes, tokens = self.axes, self.sliced_tokens
        slices, summed, gathered = map(axes.size, (axes.sliced, tensor_partial(axes), tensor_exchanged(axes)))
        return tokens * (slices - 1) + 2 * tokens * (summed - 1) / summed + 2 * tokens * (gathered - 1)


@dataclasses.dataclass(frozen=True)
class LocalExperts:
    """The experts of one rank, in `jax.shard_map`."""

    settings: DispatchSettings
    compute: ExpertComputation
    weights: ExpertWeights

    def __call__(self, received: ReceivedRows) -> Float[Array, "R H"]:
        """The weighted sum of the results of each row's choices among these experts."""
        settings = self.settings
        first_expert = settings.rank * settings.local_experts if settings.axes.expert else None
        rows = (received.x, received.topk_weights, received.topk_ids)
        return self.compute(*rows, self.weights, first_expert, expected_rows=received.expected_rows)

    def with_other_ranks(
        self, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
    ) -> Float[Array, "T H"]:
        """The weighted sum of each token's choices among the experts of all ranks, whose tokens come here meanwhile."""
        return self.compute.over_ranks(x, topk_weights, topk_ids, self.weights, axis=self.settings.axes.expert)


class Strategy(Protocol):
    """A way for tokens to meet their experts; a module with these names is one.

    `dispatch`, `send_back` and `combine` run inside `jax.shard_map`.
    """

    @property
    def NAME(self) -> str:  # noqa: N802 - a constant of the module
        """What the strategy is called."""
        ...

    @property
    def SLICES_TOKENS(self) -> bool:  # noqa: N802 - a constant of the module
        """Whether tokens that several expert ranks hold are divided among them, and results come back summed over these."""
        ...

    def unsupported(self, request: DispatchRequest) -> str | None:
        """Why the strategy cannot do what is asked, or None if it can."""
        ...

    @property
    def WHY_ONLY_BY_NAME(self) -> str | None:  # noqa: N802 - a constant of the module
        """Why the strategy runs only where it is asked for by name; None: it may be chosen."""
        ...

    def rows_moved(self, request: DispatchRequest) -> float:
        """Rows of the hidden size that a rank is expected to send, forth and back, if every expert is as likely as any."""
        ...

    def dispatch(
        self,
        settings: DispatchSettings,
        x: Float[Array, "T H"],
        topk_weights: Float[Array, "T K"],
        topk_ids: Int[Array, "T K"],
    ) -> tuple[ReceivedRows, Any]:
        """Bring rows to their experts; also returns what is needed later, a pytree."""
        ...

    def send_back(self, settings: DispatchSettings, results: Float[Array, "R H"], sent: Any) -> Any:
        """Bring the results of the received rows back to the ranks of their tokens."""
        ...

    def combine(
        self, settings: DispatchSettings, returned: Any, sent: Any, experts: LocalExperts, after: Any
    ) -> Float[Array, "T H"]:
        """Sum the results of each token.

        Args:
            settings: as for `dispatch`.
            returned: what `send_back` has returned.
            sent: what `dispatch` has kept.
            experts: compute rows that have not been received yet, where rows come in rounds.
            after: what every micro-batch's `send_back` has returned. Further rounds come after that, because compilers do not
                move work that could overlap across a loop.
        """
        ...


def rows_per_token(top_k: int, num_ranks: int, one_row_per_rank: bool) -> float:
    """Rows that a token sends, itself included, if every rank is as likely as any other for each choice."""
    return num_ranks * (1 - (1 - 1 / num_ranks) ** top_k) if one_row_per_rank else top_k


def tensor_partial(axes: LayerAxes) -> tuple[str, ...]:
    """Tensor axes whose ranks hold the same tokens."""
    return tuple(name for name in axes.tensor if name not in axes.tokens)


def tensor_exchanged(axes: LayerAxes) -> tuple[str, ...]:
    """Tensor axes whose ranks hold different tokens, all of which each of them needs."""
    return tuple(name for name in axes.tensor if name in axes.tokens)


def gather_tokens(names: tuple[str, ...], *arrays: Array) -> tuple[Array, ...]:
    """Arrays `[T, ...]` of all ranks along `names`, one after the other."""
    return tuple(jax.lax.all_gather(array, names, tiled=True) if names else array for array in arrays)


def sum_and_scatter_tokens(names: tuple[str, ...], rows: Float[Array, "Tall H"]) -> Float[Array, "T H"]:
    """The way back: rows summed over the ranks along `names`, each of which gets those of its own tokens."""
    return jax.lax.psum_scatter(rows, names, tiled=True) if names else rows


def no_rows() -> Int[Array, ""]:
    """The count of rows where there are none."""
    return jnp.zeros((), jnp.int32)
