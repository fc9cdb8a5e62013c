"""Which rows a rank sends to which: one for each token and expert, or one for each token and rank that owns any of its experts.

Gathers only, in both directions, as in `moe_jax.kernels.fused_moe`: the inverse of the order in which rows lie is kept, so the
gradient of a gather is a gather as well, every sum has a fixed order, and no accelerator has to scatter rows.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.kernels.assignment import Assignment


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
    """Row of each pair; any for pairs without."""
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
        is_row = jnp.arange(most_rows) < jnp.sum(order.groups.sizes)
        return cls(order.pair[:most_rows], is_row, order.position, order.is_local(num_destinations), order.groups.sizes)

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
        return cls(pair.reshape(-1), is_row.reshape(-1), to * capacity + offset, is_sent, sizes)

    def gather(self, x: Float[Array, "T H"]) -> Float[Array, "R H"]:
        """The row of its token for every row; any where there is none. The gradient never looks at these."""
        return _gather(x, self)

    def combine(self, results: Float[Array, "R H"], weights: Float[Array, "T K"]) -> Float[Array, "T H"]:
        """Weighted sum of the results of each token's pairs, in the order of its choices and the dtype of the weights."""
        return _combine(results, weights, self)


@jax.custom_vjp
def _gather(x: Float[Array, "T H"], rows: SentRows) -> Float[Array, "R H"]:
    return x[rows.pair // rows.position.shape[1]]


def _gather_forward(x, rows):
    return _gather(x, rows), rows


def _gather_backward(rows, cotangent):
    wide = jnp.promote_types(cotangent.dtype, jnp.float32)
    return _combine(cotangent, jnp.ones(rows.position.shape, wide), rows).astype(cotangent.dtype), None


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _combine(results: Float[Array, "R H"], weights: Float[Array, "T K"], rows: SentRows) -> Float[Array, "T H"]:
    total = jnp.zeros((), weights.dtype)
    for choice in range(weights.shape[1]):
        is_sent = rows.is_sent[:, choice]
        result = results[jnp.where(is_sent, rows.position[:, choice], 0)].astype(weights.dtype)
        total = total + jnp.where(is_sent[:, None], weights[:, choice, None] * result, 0)
    return total


def _combine_forward(results, weights, rows):
    return _combine(results, weights, rows), (results, weights, rows)


def _combine_backward(saved, cotangent):
    results, weights, rows = saved
    scaled = weights.reshape(-1)[rows.pair][:, None] * cotangent[rows.pair // weights.shape[1]]
    results_gradient = jnp.where(rows.is_row[:, None], scaled, 0).astype(results.dtype)
    weights_gradient = []
    for choice in range(weights.shape[1]):
        is_sent = rows.is_sent[:, choice]
        result = results[jnp.where(is_sent, rows.position[:, choice], 0)].astype(weights.dtype)
        weights_gradient.append(jnp.where(is_sent, jnp.sum(cotangent * result, axis=1), 0))
    return results_gradient, jnp.stack(weights_gradient, axis=1), None


_combine.defvjp(_combine_forward, _combine_backward)
