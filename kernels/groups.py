"""Where the rows of each group lie, and masks made from it."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Groups(NamedTuple):
    """Consecutive groups of rows: group g is rows `starts[g] : starts[g] + sizes[g]`."""

    starts: Int[Array, "G"]
    sizes: Int[Array, "G"]

    @classmethod
    def of(cls, group_sizes: Int[Array, "Gall"], group_offset: int | Array, num_groups: int) -> Self:
        """The `num_groups` groups from `group_offset` on, of all the groups whose sizes are given.

        An offset below 0, or with which there would be fewer groups than that, counts as the nearest one that there is.
        """
        sizes = group_sizes.astype(jnp.int32)
        starts = sums_until(sizes) - sizes
        if sizes.shape[0] == num_groups:
            return cls(starts, sizes)
        return cls(
            jax.lax.dynamic_slice_in_dim(starts, group_offset, num_groups, allow_negative_indices=False),
            jax.lax.dynamic_slice_in_dim(sizes, group_offset, num_groups, allow_negative_indices=False),
        )

    def contain(self, num_rows: int) -> Bool[Array, "M"]:
        """For each of `num_rows` rows, whether it belongs to any group."""
        row = jnp.arange(num_rows, dtype=jnp.int32)
        return (row >= self.starts[0]) & (row < self.starts[-1] + self.sizes[-1])


_FEW_GROUPS = 512
"""As many as published models have experts; comparisons grow with their square."""


def sums_until(values: Int[Array, "G"]) -> Int[Array, "G"]:
    """Sums of the values up to each, its own included: `jnp.cumsum`, for few groups by comparing all with all.

    That is one kernel on a GPU, or part of one, where a cumulative sum is two to four.
    """
    if values.shape[0] > _FEW_GROUPS:
        return jnp.cumsum(values, dtype=values.dtype)
    index = jnp.arange(values.shape[0])
    return jnp.sum(jnp.where(index[None, :] <= index[:, None], values[None, :], 0), axis=1, dtype=values.dtype)


def keep_rows(rows: Float[Array, "M N"], kept: Bool[Array, "M"]) -> Float[Array, "M N"]:
    """`rows` with those that are not kept replaced by zero, whatever they hold."""
    return jnp.where(kept[:, None], rows, jnp.zeros((), rows.dtype))


def sum_groups(
    rows: Float[Array, "M N"], groups: Groups, row_scale: Float[Array, "M"] | None = None
) -> Float[Array, "G N"]:
    """Sum of the (scaled) rows of each group, float32. Other rows may be NaN.

    A product with the matrix of memberships: its order of summation is fixed, which a scatter's on a GPU is not.
    """
    row = jnp.arange(rows.shape[0])[None, :]
    starts, ends = groups.starts[:, None], (groups.starts + groups.sizes)[:, None]
    member = ((row >= starts) & (row < ends)).astype(jnp.float32)
    in_any = jnp.any(member > 0, axis=0)
    scaled = rows.astype(jnp.float32) * (1 if row_scale is None else row_scale[:, None])
    scaled = jnp.where(in_any[:, None], scaled, 0)
    return jnp.dot(member, scaled, precision=jax.lax.Precision.HIGHEST)
