"""Which rows a rank sends to which: one for each token and expert, or one for each token and rank that owns any of its experts.

No row is scattered, in either direction: see `moe_jax.kernels.pair_rows`.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.kernels.assignment import Assignment
from moe_jax.kernels.pair_rows import PairRows


def first_choices(key: Int[Array, "T K"]) -> Bool[Array, "T K"]:
    """Whether no earlier choice of the same token has the same key."""
    same = key[:, :, None] == key[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), k=-1)
    return ~jnp.any(same & earlier, axis=2)


def merge_choices(
    topk_weights: Float[Array, "T K"], key: Int[Array, "T K"], carries: Bool[Array, "T K"]
) -> Float[Array, "T K"]:
    """For choices that carry a row the summed weights of all choices with their key; zero for the others."""
    same = (key[:, :, None] == key[:, None, :]) & carries[:, :, None]
    return jnp.sum(jnp.where(same, topk_weights[:, None, :], 0), axis=2)


def count_unserved(key: Int[Array, "T K"], is_valid: Bool[Array, "T K"], is_sent: Bool[Array, "T K"]) -> Int[Array, ""]:
    """Valid choices of which no choice with the same key was sent."""
    same = key[:, :, None] == key[:, None, :]
    is_served = jnp.any(same & is_sent[:, None, :], axis=2)
    return jnp.sum(is_valid & ~is_served, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SentRows:
    """Where the rows lie that a rank sends; their results return to the same places.

    A row belongs to a *pair*: token * K + choice.
    """

    pair: Int[Array, "R"]
    """Pair of each row; any where there is none."""
    is_row: Bool[Array, "R"]
    """Whether there is a row."""
    position: Int[Array, "T K"]
    """Row of each pair; 0 for pairs without."""
    is_sent: Bool[Array, "T K"]
    """Whether a pair has a row."""
    sizes: Int[Array, "destinations"]
    """Rows for each destination, in their order, gaps not counted."""

    @classmethod
    def dense(
        cls, destination: Int[Array, "T K"], num_destinations: int, *, most_rows: int, most_comparisons: int
    ) -> Self:
        """Rows by destination, one after the other.

        Args:
            destination: of each pair; others than `0 .. num_destinations - 1` send none.
            num_destinations: experts or ranks.
            most_rows: R, no fewer than can be sent.
            most_comparisons: up to so many, pairs are sorted by comparing all with all.
        """
        order = Assignment.of(destination, 0, num_destinations, most_comparisons=most_comparisons)
        sizes = order.groups.sizes
        is_row = jnp.arange(most_rows) < jnp.sum(sizes)
        is_sent = order.is_local(num_destinations)
        return cls(order.pair[:most_rows], is_row, jnp.where(is_sent, order.position, 0), is_sent, sizes)

    @classmethod
    def padded(
        cls, destination: Int[Array, "T K"], num_destinations: int, *, capacity: int, most_comparisons: int
    ) -> Self:
        """`capacity` places for each destination; pairs beyond, the last ones, are not sent."""
        order = Assignment.of(destination, 0, num_destinations, most_comparisons=most_comparisons)
        starts, wanted = order.groups
        sizes = jnp.minimum(wanted, capacity)
        place = jnp.arange(capacity, dtype=jnp.int32)
        is_row = place < sizes[:, None]
        pair = order.pair[jnp.where(is_row, starts[:, None] + place, 0)]
        to = jnp.minimum(order.expert, num_destinations - 1)
        offset = order.position - starts[to]
        is_sent = order.is_local(num_destinations) & (offset < capacity)
        position = jnp.where(is_sent, to * capacity + offset, 0)
        return cls(pair.reshape(-1), is_row.reshape(-1), position, is_sent, sizes)

    @property
    def of_pairs(self) -> PairRows:
        """The same without the destinations."""
        return PairRows(self.pair, self.position, self.is_row, self.is_sent)

    def gather(self, x: Float[Array, "T H"]) -> Float[Array, "R H"]:
        """The row of its token for every row; any where there is none. The gradient never looks at these."""
        return self.of_pairs.gather(x)

    def combine(self, results: Float[Array, "R H"], weights: Float[Array, "T K"]) -> Float[Array, "T H"]:
        """Weighted sum of the results of each token's pairs, in the order of its choices and the dtype of the weights."""
        return self.of_pairs.combine(results, weights)
