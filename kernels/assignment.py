"""Which rows go to which expert: sort the (token, choice) pairs by expert, gather their rows, and combine results.

Gathers only, in both directions: the inverse of the sort is kept, so the gradient of a gather is a gather as well. Scatters
are slow on CPUs and their summation order is undefined on GPUs; here every sum has a fixed order.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .groups import Groups

MOST_COMPARISONS = {"cpu": 0, "gpu": 2**24, "tpu": 2**20}
"""By platform: so many comparisons of all with all take less time than a sort or a scatter. They are one kernel on a GPU, whose
multiprocessors make 2**24 in the time of about two launches; a sort and a scatter are several."""


class Assignment(NamedTuple):
    """The N = T * K pairs, sorted by expert, those without a local expert last."""

    pair: Int[Array, "N"]
    """Pair (token * K + choice) of each sorted row."""
    position: Int[Array, "T K"]
    """Sorted row of each pair: the inverse of `pair`."""
    expert: Int[Array, "T K"]
    """Local expert of each pair; E for pairs without one."""
    groups: Groups
    """Rows of each local expert."""

    @classmethod
    def of(
        cls, topk_ids: Int[Array, "T K"], expert_offset: int | Array, num_experts: int, *, most_comparisons: int = 0
    ) -> Self:
        """Sort pairs by local expert, keeping the order of tokens within an expert.

        Few pairs are sorted by comparing all with all, if that takes no more than `most_comparisons`.
        """
        num_pairs = topk_ids.size
        local = topk_ids.astype(jnp.int32) - jnp.asarray(expert_offset, jnp.int32)
        # Negative numbers become large ones.
        expert = jnp.minimum(local.astype(jnp.uint32), num_experts).astype(jnp.int32)
        order = expert.reshape(-1) * num_pairs + jnp.arange(num_pairs, dtype=jnp.int32)
        if num_pairs**2 <= most_comparisons and num_pairs * (num_experts + 1) < 2**31:
            position = jnp.sum(order[None, :] < order[:, None], axis=1, dtype=jnp.int32)
            pair = inverse_of(position, num_pairs, most_comparisons)
        else:
            pair = sorted_by(expert.reshape(-1), num_experts)
            position = inverse_of(pair, num_pairs, most_comparisons)
        sizes = jnp.sum(expert.reshape(1, -1) == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)
        return cls(pair, position.reshape(topk_ids.shape), expert, Groups.of(sizes, 0, num_experts))

    @property
    def token(self) -> Int[Array, "N"]:
        """Token of each sorted row."""
        return self.pair // self.position.shape[1]

    def is_local(self, num_experts: int) -> Bool[Array, "T K"]:
        """Whether a pair's expert is one of those whose weights are here."""
        return self.expert < num_experts


def inverse_of(target: Int[Array, "N"], size: int, most_comparisons: int) -> Int[Array, "size"]:
    """Which entry of `target` names each of 0, 1 … size - 1; -1 for those that none names. Entries beyond `size` don't count."""
    source = jnp.arange(target.shape[0], dtype=jnp.int32)
    if target.shape[0] * size <= most_comparisons:
        return jnp.max(jnp.where(names(target, size), source, -1), axis=1, initial=-1)
    return jnp.full(size, -1, jnp.int32).at[target].set(source, mode="drop", unique_indices=True)


def names(target: Int[Array, "N"], size: int) -> Bool[Array, "size N"]:
    """Whether an entry of `target` names each of 0, 1 … size - 1."""
    return target[None, :] == jnp.arange(size, dtype=jnp.int32)[:, None]


def sorted_by(key: Int[Array, "N"], largest: int) -> Int[Array, "N"]:
    """0, 1 … N - 1 in the order of their keys, equal ones as they are; keys are in [0, largest]."""
    size = key.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    if size * (largest + 1) < 2**31:
        # One sort of plain integers that carry both: on CPUs several times faster than a sort of two operands. No two are equal;
        # for a stable sort XLA would add an operand on GPUs.
        return jnp.sort(key * size + index, stable=False) % size
    return jax.lax.sort((key, index), num_keys=1, is_stable=True)[1]


@jax.custom_vjp
def gather_rows(x: Float[Array, "T H"], assignment: Assignment) -> Float[Array, "N H"]:
    """The row of its token for every sorted pair."""
    return x[assignment.token]


def _gather_rows_forward(x, assignment):
    return gather_rows(x, assignment), assignment


def _gather_rows_backward(assignment, cotangent):
    wide = jnp.promote_types(cotangent.dtype, jnp.float32)
    total = sum((cotangent[position].astype(wide) for position in assignment.position.T), jnp.zeros((), wide))
    return total.astype(cotangent.dtype), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def combine_rows(
    results: Float[Array, "N H"], weights: Float[Array, "T K"], assignment: Assignment
) -> Float[Array, "T H"]:
    """Weighted sum of the results of each token's pairs, in the order of its choices; the dtype is that of the weights."""
    columns = zip(weights.T, assignment.position.T, strict=True)
    terms = (weight[:, None] * results[position].astype(weights.dtype) for weight, position in columns)
    return sum(terms, jnp.zeros((), weights.dtype))


def _combine_rows_forward(results, weights, assignment):
    return combine_rows(results, weights, assignment), (results, weights, assignment)


def _combine_rows_backward(saved, cotangent):
    results, weights, assignment = saved
    results_gradient = weights.reshape(-1)[assignment.pair][:, None] * cotangent[assignment.token]
    weights_gradient = [
        jnp.sum(cotangent * results[position].astype(weights.dtype), axis=1) for position in assignment.position.T
    ]
    return results_gradient.astype(results.dtype), jnp.stack(weights_gradient, axis=1), None


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)
