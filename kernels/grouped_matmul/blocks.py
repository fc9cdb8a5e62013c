"""Loops over blocks of rows that share a group: the core of the XLA implementations, forwards and backwards.

Rows are sorted by group. A block starts at a multiple of the block size after its group's first row, and has a static
number of rows, so the last block of a group reaches into the next group (or past the end: rows are padded by one block).
What it computes there is wrong, and is overwritten by the blocks that follow, because blocks run in the order of their
rows; what remains past the last group is masked by the caller. No row is computed more often than that.

A matrix is multiplied in slices of a few megabytes. XLA on CPUs copies a slice before it multiplies; a small copy is
reused from cache, a large one is written to fresh memory, and the page faults cost more than the product.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..groups import Groups
from ..integers import slice_starts
from ..varying import varying_like


class Tiling(NamedTuple):
    """Static sizes of the loops."""

    block_rows: int
    """Rows per block."""
    slice_bytes: int
    """Largest slice of a matrix that is multiplied at once."""

    def describe(self) -> str:
        """For `explain`."""
        return f"blocks of {self.block_rows} rows, slices of at most {self.slice_bytes / 2**20:.3g} MiB of a matrix"


class Schedule(NamedTuple):
    """Which block computes what; entries from `num_blocks` on mean nothing."""

    group: Int[Array, "blocks"]
    row: Int[Array, "blocks"]
    num_blocks: Int[Array, ""]

    @classmethod
    def of(cls, groups: Groups, num_rows: int, block_rows: int) -> "Schedule":
        """Blocks that cover every row of every group, in the order of the rows."""
        num_groups = groups.sizes.shape[0]
        capacity = min(num_rows, num_rows // block_rows + num_groups)
        blocks_of_group = -(-groups.sizes // block_rows)
        last = jnp.cumsum(blocks_of_group)
        block = jnp.arange(capacity, dtype=jnp.int32)
        group = jnp.minimum(jnp.sum(block[:, None] >= last, axis=1, dtype=jnp.int32), num_groups - 1)
        within = block - (last - blocks_of_group)[group]
        return cls(group, groups.starts[group] + within * block_rows, last[-1])


def multiply(
    rows: Float[Array, "Mpadded D"],
    weights: Float[Array, "G N D"],
    schedule: Schedule,
    tiling: Tiling,
    *,
    output_dtype: jnp.dtype,
    bias: Float[Array, "G N"] | None = None,
    transposed: bool = False,
) -> Float[Array, "Mpadded N"]:
    """rows[i] @ weights[g].T (+ bias[g]) for every row i of the scheduled blocks; zero or arbitrary in all others.

    With `transposed`, rows are [Mpadded, N] and the result is rows[i] @ weights[g], [Mpadded, D].
    """
    contracted, kept = (0, 1) if transposed else (1, 0)
    width = weights.shape[1 + kept]
    slice_width, num_slices = _slices(width, weights.shape[1 + contracted] * weights.dtype.itemsize, tiling)
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)

    def block(index: Array, result: Array) -> Array:
        group, row = schedule.group[index], schedule.row[index]
        operand = jax.lax.dynamic_slice_in_dim(rows, row, tiling.block_rows)

        def one_slice(number: int | Array, result: Array) -> Array:
            first = (
                number * slice_width
                if num_slices * slice_width == width
                else jnp.minimum(number * slice_width, width - slice_width)
            )
            start, shape = [group, 0, 0], [1, *weights.shape[1:]]
            start[1 + kept], shape[1 + kept] = first, slice_width
            matrix = jax.lax.dynamic_slice(weights, slice_starts(*start), shape)[0]
            product = jax.lax.dot_general(
                operand, matrix, (((1,), (contracted,)), ((), ())), preferred_element_type=accumulator
            )
            if bias is not None:
                product += jax.lax.dynamic_slice(bias, slice_starts(group, first), (1, slice_width)).astype(accumulator)
            return jax.lax.dynamic_update_slice(result, product.astype(output_dtype), slice_starts(row, first))

        return _repeat(num_slices, one_slice, result)

    nothing = varying_like(jnp.zeros((rows.shape[0], width), output_dtype), rows)
    return jax.lax.fori_loop(0, schedule.num_blocks, block, nothing)


def contract_rows(
    left: Float[Array, "Mpadded N"],
    right: Float[Array, "Mpadded D"],
    groups: Groups,
    block_rows: int,
    *,
    output_dtype: jnp.dtype,
) -> Float[Array, "G N D"]:
    """left[rows of g].T @ right[rows of g] for every group g: the gradient of the weights."""
    accumulator = jnp.promote_types(left.dtype, jnp.float32)
    shape = (left.shape[1], right.shape[1])

    def one_group(group: Array, result: Array) -> Array:
        start, size = groups.starts[group], groups.sizes[group]

        def add_block(index: Array, total: Array) -> Array:
            row = start + index * block_rows
            member = (index * block_rows + jnp.arange(block_rows) < size)[:, None]
            left_block, right_block = (
                jnp.where(member, jax.lax.dynamic_slice_in_dim(side, row, block_rows), 0) for side in (left, right)
            )
            dimensions = (((0,), (0,)), ((), ()))
            return total + jax.lax.dot_general(left_block, right_block, dimensions, preferred_element_type=accumulator)

        nothing = varying_like(jnp.zeros(shape, accumulator), left)
        total = jax.lax.fori_loop(0, -(-size // block_rows), add_block, nothing)
        return jax.lax.dynamic_update_index_in_dim(result, total.astype(output_dtype), group, 0)

    num_groups = groups.sizes.shape[0]
    nothing = varying_like(jnp.zeros((num_groups, *shape), output_dtype), left)
    return jax.lax.fori_loop(0, num_groups, one_group, nothing)


def sum_rows(
    rows: Float[Array, "Mpadded N"], groups: Groups, block_rows: int, *, output_dtype: jnp.dtype
) -> Float[Array, "G N"]:
    """Sum of the rows of every group: the gradient of the bias."""
    ones = varying_like(jnp.ones((rows.shape[0], 1), rows.dtype), rows)
    return contract_rows(ones, rows, groups, block_rows, output_dtype=output_dtype)[:, 0]


def _slices(width: int, bytes_per_column: int, tiling: Tiling) -> tuple[int, int]:
    """Width and number of slices of a matrix: as few as fit the limit, of equal width; the last may overlap its neighbour."""
    number = math.ceil(width * bytes_per_column / tiling.slice_bytes)
    slice_width = math.ceil(width / max(number, 1))
    return slice_width, math.ceil(width / slice_width)


_LARGEST_UNROLLED_LOOP = 16


def _repeat(times: int, body: Callable[[int | Array, Array], Array], value: Array) -> Array:
    """A loop of static length, unrolled if it is short: static slices are cheaper than a loop around dynamic ones."""
    if times > _LARGEST_UNROLLED_LOOP:
        return jax.lax.fori_loop(0, times, body, value)
    for index in range(times):
        value = body(index, value)
    return value
