"""Fused shared experts on a mesh: every rank runs them among its own experts, on tokens of its own.

No token travels for them, whatever the strategy. Where a strategy leaves tokens whole, they are further choices of each token,
and of several ranks that hold the same token one takes it. Where rows travel one by one, they are further rows behind those that
have arrived.

Source: spec 3.1 and 3.3 (every rank has them, behind its routed experts).
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel.dispatch import (
    DispatchRequest,
    DispatchSettings,
    LocalExperts,
    ReceivedRows,
    Strategy,
    gather_tokens,
    sum_and_scatter_tokens,
    tensor_exchanged,
)


class SentBeside(NamedTuple):
    """What the way back needs."""

    sent: Any
    """By the strategy alone."""
    num_received: int
    """Rows that the strategy has brought; the others are this rank's own."""


@dataclasses.dataclass(frozen=True)
class WithFusedSharedExperts:
    """A `Strategy` whose ranks have `count` shared experts behind their routed ones.

    Between ranks, the copy of shared expert j on rank r has the id `num_experts + r * count + j`, and no strategy sends anything
    for it. In what arrives, this rank's copies have the ids behind those of its routed experts.
    """

    strategy: Strategy
    """How tokens meet their routed experts."""
    count: int
    """Shared experts of each rank."""
    weight: float
    """Router weight of every token's shared experts."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a constant of strategies
        """That of the strategy."""
        return self.strategy.NAME

    @property
    def SLICES_TOKENS(self) -> bool:  # noqa: N802 - a constant of strategies
        """As the strategy does."""
        return self.strategy.SLICES_TOKENS

    @property
    def WHY_ONLY_BY_NAME(self) -> str | None:  # noqa: N802 - a constant of strategies
        """As of the strategy."""
        return self.strategy.WHY_ONLY_BY_NAME

    def unsupported(self, request: DispatchRequest) -> str | None:
        """What the strategy cannot do."""
        return self.strategy.unsupported(request)

    def rows_moved(self, request: DispatchRequest) -> float:
        """Those of routed experts only."""
        return self.strategy.rows_moved(request)

    def dispatch(
        self,
        settings: DispatchSettings,
        x: Float[Array, "T H"],
        topk_weights: Float[Array, "T K"],
        topk_ids: Int[Array, "T K"],
    ) -> tuple[ReceivedRows, Any]:
        """Bring rows to their routed experts, and this rank's own tokens to its shared ones."""
        if self.SLICES_TOKENS:
            received, sent = self.strategy.dispatch(settings, x, topk_weights, topk_ids)
            sent = SentBeside(sent, received.x.shape[0])
            received = self._append_rows(settings, received, x)
        else:
            topk_weights, topk_ids = self._append_choices(settings, topk_weights, topk_ids)
            received, sent = self.strategy.dispatch(settings, x, topk_weights, topk_ids)
        return dataclasses.replace(received, topk_ids=self._as_on_rank(settings, received.topk_ids)), sent

    def send_back(self, settings: DispatchSettings, results: Float[Array, "R H"], sent: Any) -> Any:
        """Bring the routed experts' results back; the shared experts' are here."""
        if not self.SLICES_TOKENS:
            return self.strategy.send_back(settings, results, sent)
        routed, shared = results[: sent.num_received], results[sent.num_received :]
        return self.strategy.send_back(settings, routed, sent.sent), shared

    def combine(
        self, settings: DispatchSettings, returned: Any, sent: Any, experts: LocalExperts, after: Any
    ) -> Float[Array, "T H"]:
        """Sum the routed experts' results, and add the shared experts'."""
        if not self.SLICES_TOKENS:
            return self.strategy.combine(settings, returned, sent, experts, after)
        routed, shared = returned
        output = self.strategy.combine(settings, routed, sent.sent, experts, after)
        exchanged = tensor_exchanged(settings.axes)
        num_tokens = output.shape[0] * settings.axes.size(exchanged)
        shared = jnp.sum(shared.reshape(-1, num_tokens, shared.shape[1]), axis=0)
        return output + sum_and_scatter_tokens(exchanged, shared)

    def _first_id(self, settings: DispatchSettings) -> Int[Array, ""] | int:
        """Of this rank's shared experts, between ranks."""
        return settings.num_experts + settings.rank * self.count

    def _append_choices(
        self, settings: DispatchSettings, topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
    ) -> tuple[Float[Array, "T K+S"], Int[Array, "T K+S"]]:
        """Every token chooses the shared experts, too: of expert ranks that hold the same tokens, those of one in turn."""
        takers = settings.axes.sliced
        turn = jnp.arange(topk_ids.shape[0])[:, None] % settings.axes.size(takers)
        shared_ids = self._first_id(settings) + jnp.arange(self.count, dtype=topk_ids.dtype)
        shared_ids = jnp.where(turn == settings.axes.position(takers), shared_ids, -1)
        shared_weights = jnp.full(shared_ids.shape, self.weight, topk_weights.dtype)
        return jnp.concatenate([topk_weights, shared_weights], axis=1), jnp.concatenate([topk_ids, shared_ids], axis=1)

    def _append_rows(self, settings: DispatchSettings, received: ReceivedRows, x: Float[Array, "T H"]) -> ReceivedRows:
        """Behind the rows that have arrived those of the tokens here, as often as it takes for all shared experts."""
        (own,) = gather_tokens(tensor_exchanged(settings.axes), x)
        num_choices = received.topk_ids.shape[1]
        copies = -(-self.count // num_choices)
        slot = jnp.arange(copies * num_choices, dtype=received.topk_ids.dtype)
        slot = jnp.where(slot < self.count, self._first_id(settings) + slot, -1)
        ids = jnp.broadcast_to(slot.reshape(copies, 1, num_choices), (copies, own.shape[0], num_choices))
        ids = ids.reshape(-1, num_choices)
        return dataclasses.replace(
            received,
            x=jnp.concatenate([received.x, *[own] * copies]),
            topk_weights=jnp.concatenate(
                [received.topk_weights, jnp.full(ids.shape, self.weight, received.topk_weights.dtype)]
            ),
            topk_ids=jnp.concatenate([received.topk_ids, ids]),
            expected_rows=received.expected_rows + own.shape[0] * self.count,
        )

    def _as_on_rank(self, settings: DispatchSettings, topk_ids: Int[Array, "R k"]) -> Int[Array, "R k"]:
        """Ids of this rank's experts, the shared ones behind the routed ones; -1 for those of other ranks."""
        first_routed = settings.rank * settings.local_experts
        behind_routed = first_routed + settings.local_experts
        shared = topk_ids - self._first_id(settings)
        is_shared = (shared >= 0) & (shared < self.count)
        is_routed = (topk_ids >= first_routed) & (topk_ids < behind_routed)
        return jnp.where(is_shared, behind_routed + shared, jnp.where(is_routed, topk_ids, -1))
