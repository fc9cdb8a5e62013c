"""Rows of pairs of a token and a choice: from tokens to rows and back, with gradients.

Gathers only, in both directions: which row each pair has is kept beside which pair each row has, so the gradient of a gather is a
gather as well. Scatters are slow on CPUs and their summation order is undefined on GPUs; here every sum has a fixed order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .sum_of_choices import sum_of_choices


class PairRows(NamedTuple):
    """Where the rows of pairs lie."""

    pair: Int[Array, "R"]
    """Pair (token * K + choice) of each row; any where there is none."""
    position: Int[Array, "T K"]
    """Row of each pair; any row for pairs without."""
    is_row: Bool[Array, "R"] | None = None
    """Whether there is a row; None: everywhere."""
    has_row: Bool[Array, "T K"] | None = None
    """Whether a pair has a row; None: all have."""

    @property
    def token(self) -> Int[Array, "R"]:
        """Token of each row."""
        return self.pair // self.position.shape[1]

    def gather(self, x: Float[Array, "T H"]) -> Float[Array, "R H"]:
        """The row of its token for every row; any where there is none. The gradient never looks at these."""
        return _gather(x, self)

    def combine(self, results: Float[Array, "R H"], weights: Float[Array, "T K"]) -> Float[Array, "T H"]:
        """Weighted sum of the results of each token's pairs, in the order of its choices and the dtype of the weights."""
        return _combine(results, weights, self)


@jax.custom_vjp
def _gather(x: Float[Array, "T H"], rows: PairRows) -> Float[Array, "R H"]:
    return x[rows.token]


def _gather_forward(x, rows):
    return _gather(x, rows), rows


def _gather_backward(rows, cotangent):
    wide = jnp.promote_types(cotangent.dtype, jnp.float32)
    total = sum_of_choices(cotangent, rows.position, counts=rows.has_row, dtype=wide)
    return total.astype(cotangent.dtype), None


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _combine(results: Float[Array, "R H"], weights: Float[Array, "T K"], rows: PairRows) -> Float[Array, "T H"]:
    return sum_of_choices(results, rows.position, weights=weights, counts=rows.has_row)


def _combine_forward(results, weights, rows):
    return _combine(results, weights, rows), (results, weights, rows)


def _combine_backward(saved, cotangent):
    results, weights, rows = saved
    results_gradient = weights.reshape(-1)[rows.pair][:, None] * cotangent[rows.token]
    if rows.is_row is not None:
        results_gradient = jnp.where(rows.is_row[:, None], results_gradient, 0)
    result_of = (results[rows.position[:, choice]].astype(weights.dtype) for choice in range(weights.shape[1]))
    weights_gradient = jnp.stack([jnp.sum(cotangent * result, axis=1) for result in result_of], axis=1)
    if rows.has_row is not None:
        weights_gradient = jnp.where(rows.has_row, weights_gradient, 0)
    return results_gradient.astype(results.dtype), weights_gradient, None


_combine.defvjp(_combine_forward, _combine_backward)
