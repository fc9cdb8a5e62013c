"""Grouped matmul from ordinary XLA operations: a loop over blocks of rows. For CPUs, and any accelerator without a kernel.

`jax.lax.ragged_dot` is not used: on CPUs and GPUs it multiplies every row by the matrix of every group.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from ..groups import Groups, keep_rows
from ..selection import Formulation
from . import blocks
from .request import Request

NAME = "xla"


def unsupported(request: Request) -> str | None:
    """Nothing is."""
    return None


def tiling_for(num_rows: int, num_groups: int, platform: str) -> blocks.Tiling:
    """Loop sizes from static shapes.

    A block of about 1.25 times the mean rows per group needs one block for most groups if rows are spread evenly, and wastes
    little; it is a multiple of 8, as the matmuls' own tiles are. Accelerators get larger blocks, which keep them busier, and
    whole matrices, since slicing gains them nothing.
    """
    mean = num_rows / num_groups
    if platform == "cpu":
        return blocks.Tiling(block_rows=_round_up(mean * 1.25, 8, 4, 512), slice_bytes=4 * 2**20)
    return blocks.Tiling(block_rows=_round_up(mean * 1.25, 128, 128, 1024), slice_bytes=2**31)


def _round_up(value: float, multiple: int, smallest: int, largest: int) -> int:
    if value <= smallest:
        return smallest
    return min(-(-int(value) // multiple) * multiple, largest)


def formulation(request: Request) -> Formulation:
    """One loop; its sizes follow from the shapes."""
    num_rows, num_groups = request.rows.shape[0], request.weights.shape[0]
    tiling = tiling_for(num_rows, num_groups, request.platform)
    return Formulation(
        f"loop over {tiling.describe()}",
        f"{num_rows} rows in {num_groups} groups are {num_rows / num_groups:.3g} per group, on {request.platform}",
    )


def run(request: Request) -> Array:
    """Multiply; differentiable in rows, weights and bias."""
    rows, weights = request.rows, request.weights
    if rows.shape[0] == 0 or weights.shape[1] == 0:
        return jnp.zeros((rows.shape[0], weights.shape[1]), request.output_dtype)
    groups = Groups.of(request.group_sizes, request.group_offset, weights.shape[0])
    tiling = tiling_for(rows.shape[0], weights.shape[0], request.platform)
    return multiply_groups(tiling, request.output_dtype, rows, weights, request.bias, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply_groups(
    tiling: blocks.Tiling, output_dtype: jnp.dtype, rows: Array, weights: Array, bias: Array | None, groups: Groups
) -> Array:
    """rows[i] @ weights[g].T + bias[g] for the rows of every group, zero for the others: [M, N] of `output_dtype`."""
    num_rows = rows.shape[0]
    schedule = blocks.Schedule.of(groups, num_rows, tiling.block_rows)
    padded = _pad(rows, tiling)
    matrices = weights.astype(rows.dtype)
    result = blocks.multiply(padded, matrices, schedule, tiling, output_dtype=output_dtype, bias=bias)
    return keep_rows(result[:num_rows], groups.contain(num_rows))


def _forward(tiling, output_dtype, rows, weights, bias, groups):
    result = multiply_groups(tiling, output_dtype, rows, weights, bias, groups)
    return result, (rows, weights, bias, groups)


def _backward(tiling, output_dtype, saved, cotangent):
    rows, weights, bias, groups = saved
    num_rows = rows.shape[0]
    schedule = blocks.Schedule.of(groups, num_rows, tiling.block_rows)
    padded_cotangent = _pad(cotangent.astype(rows.dtype), tiling)
    matrices = weights.astype(rows.dtype)
    rows_gradient = blocks.multiply(
        padded_cotangent, matrices, schedule, tiling, output_dtype=rows.dtype, transposed=True
    )
    rows_gradient = keep_rows(rows_gradient[:num_rows], groups.contain(num_rows))
    weights_gradient = blocks.contract_rows(
        padded_cotangent, _pad(rows, tiling), groups, tiling.block_rows, output_dtype=weights.dtype
    )
    bias_gradient = None
    if bias is not None:
        bias_gradient = blocks.sum_rows(_pad(cotangent, tiling), groups, tiling.block_rows, output_dtype=bias.dtype)
    return rows_gradient, weights_gradient, bias_gradient, None


multiply_groups.defvjp(_forward, _backward)


def _pad(rows: Array, tiling: blocks.Tiling) -> Array:
    """`rows` and one more block, into which the last block of the last group may reach."""
    return jnp.pad(rows, ((0, tiling.block_rows), (0, 0)))
