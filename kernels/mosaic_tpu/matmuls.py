"""The three products of a grouped matmul and its gradient on TPUs: choose tiles, build tables, call.

Results of `multiply` and `multiply_and_keep` are padded to a multiple of 128 columns, which hold anything, and rows may be
padded likewise: what one kernel returns, the next takes, without a copy between them. `expected_rows`, where it is an argument,
is about how many of the rows are those of a group, from which kernel and tiles are chosen; None: all of them.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..activations import Activation
from ..device import TpuDevice
from ..groups import Groups, keep_rows
from ..groups import sum_groups as bias_gradient
from ..integers import in_32_bits
from . import schedule, weights_gradient_kernel
from .choice import ChosenTiles, RowsProblem, choose_row_tiles, choose_stream_tiles, streams_weights
from .rows_kernel import multiply_rows
from .schedule import ROW_ALIGNMENT, VisitTable
from .stream_kernel import stream_weights
from .weights_gradient_tiles import default_weights_gradient_tiles

__all__ = [
    "bias_gradient",
    "chosen_for_forward",
    "multiply",
    "multiply_and_keep",
    "multiply_compact",
    "rows_gradient",
    "schedule",
    "weights_gradient",
]


def chosen_for_forward(
    expected_rows: int,
    weights_shape: tuple[int, ...],
    dtype: DTypeLike,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> tuple[Literal["rows", "stream"], ChosenTiles]:
    """Kernel and tiles of `multiply`, for weights of shape [G, P, N, D]."""
    problem = _problem(expected_rows, weights_shape, dtype, output_dtype)
    if streams_weights(problem):
        return "stream", choose_stream_tiles(problem, device)
    return "rows", choose_row_tiles(problem, device)


@in_32_bits
def multiply(
    rows: Float[Array, "M Dpadded"],
    weights: Float[Array, "S P N D"],
    groups: Groups,
    *,
    first_matrix: int | Int[Array, ""] = 0,
    bias: Float[Array, "G P N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    expected_rows: int | None = None,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> Float[Array, "M Npadded"]:
    """row_scale * activation(rows @ matrices + bias); rows of no group hold anything. See `rows_kernel.multiply_rows`.

    The matrices of the G groups are those from `first_matrix` on; `bias` has those of the groups alone.
    """
    shape = (groups.sizes.shape[0], *weights.shape[1:])
    if expected_rows is None:
        expected_rows = rows.shape[0]
    kernel, chosen = chosen_for_forward(expected_rows, shape, rows.dtype, output_dtype, device)
    if kernel == "stream":
        tiles = chosen.tiles

        @jax.custom_batching.sequential_vmap
        def call(rows, weights, groups, first_matrix, bias, row_scale):
            return stream_weights(
                rows,
                weights,
                VisitTable.of(groups, rows.shape[0], tiles.rows, first_matrix=first_matrix),
                tiles=tiles,
                bias=bias,
                activation=activation,
                row_scale=row_scale,
                output_dtype=output_dtype,
                device=device,
            )

        return call(rows, weights, groups, jnp.asarray(first_matrix), bias, row_scale)
    return multiply_and_keep(
        rows,
        weights,
        groups,
        first_matrix=first_matrix,
        bias=bias,
        activation=activation,
        row_scale=row_scale,
        keep_projected=False,
        expected_rows=expected_rows,
        output_dtype=output_dtype,
        device=device,
    )[0]


@in_32_bits
def multiply_and_keep(
    rows: Float[Array, "M Dpadded"],
    weights: Float[Array, "S P N D"],
    groups: Groups,
    *,
    first_matrix: int | Int[Array, ""] = 0,
    bias: Float[Array, "G P N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    keep_projected: bool,
    expected_rows: int | None = None,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> tuple[Float[Array, "M Npadded"], Float[Array, "M P N"] | None]:
    """The same, and what enters the activation if it is to be kept for the backward pass."""
    shape = (groups.sizes.shape[0], *weights.shape[1:])
    if expected_rows is None:
        expected_rows = rows.shape[0]
    problem = _problem(expected_rows, shape, rows.dtype, output_dtype, keep_projected, row_scale)
    tiles = choose_row_tiles(problem, device).tiles

    @jax.custom_batching.sequential_vmap
    def call(rows, weights, groups, first_matrix, bias, row_scale):
        return multiply_rows(
            rows,
            weights,
            VisitTable.of(groups, rows.shape[0], tiles.rows, first_matrix=first_matrix),
            tiles=tiles,
            bias=bias,
            activation=activation,
            row_scale=row_scale,
            keep_projected=keep_projected,
            output_dtype=output_dtype,
            device=device,
        )

    result, projected = call(rows, weights, groups, jnp.asarray(first_matrix), bias, row_scale)
    return result, None if projected is None else projected.swapaxes(0, 1)[:, :, : weights.shape[2]]


@in_32_bits
def multiply_compact(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G N D"] | Float[Array, "G D N"],
    groups: Groups,
    *,
    contract: Literal["in", "out"] = "in",
    bias: Float[Array, "G N"] | None = None,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> Float[Array, "M N"]:
    """Rows @ matrices + bias for groups that lie one after the other; rows before and after them become zero unread.

    With `contract="out"` the middle axis of the weights is contracted: the gradient of rows.
    """
    num_rows = rows.shape[0]
    if contract == "in":
        matrices = weights[:, None]
        kernel, _ = chosen_for_forward(num_rows, matrices.shape, rows.dtype, output_dtype, device)
        if kernel == "stream":
            result = multiply(
                _whole_tiles(rows),
                matrices,
                groups,
                bias=None if bias is None else bias[:, None],
                expected_rows=num_rows,
                output_dtype=output_dtype,
                device=device,
            )
            return keep_rows(result[:num_rows, : weights.shape[1]], groups.contain(num_rows))
    return _multiply_plainly(rows, weights, groups, contract, bias, output_dtype, device, zero_outside=True)


@in_32_bits
def rows_gradient(
    cotangent: Float[Array, "M N"],
    weights: Float[Array, "G N D"],
    groups: Groups,
    *,
    expected_rows: int | None = None,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> Float[Array, "M D"]:
    """Cotangent @ matrices: the gradient of `rows @ matrices.T`. Rows of no group hold anything."""
    return _multiply_plainly(
        cotangent, weights, groups, "out", None, output_dtype, device, zero_outside=False, expected_rows=expected_rows
    )


@in_32_bits
def weights_gradient(
    cotangent: Float[Array, "M N"],
    rows: Float[Array, "M D"],
    groups: Groups,
    *,
    expected_rows: int | None = None,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> Float[Array, "G N D"]:
    """cotangent.T @ rows over the rows of each group; zero for a group without rows. Other rows may be NaN."""
    tiles = default_weights_gradient_tiles(
        rows.shape[0] if expected_rows is None else expected_rows,
        cotangent.shape[1],
        rows.shape[1],
        rows.dtype.itemsize,
        jnp.dtype(output_dtype).itemsize,
        device,
    )

    @jax.custom_batching.sequential_vmap
    def call(cotangent, rows, groups):
        return weights_gradient_kernel.weights_gradient(
            cotangent, rows, groups, tiles=tiles, output_dtype=output_dtype, device=device
        )

    return call(cotangent, rows, groups)


def _multiply_plainly(
    rows: Array,
    weights: Array,
    groups: Groups,
    contract: Literal["in", "out"],
    bias: Array | None,
    output_dtype: DTypeLike,
    device: TpuDevice,
    *,
    zero_outside: bool,
    expected_rows: int | None = None,
) -> Array:
    """Rows times one matrix of each group, without padding of the result."""
    num_groups, *matrix = weights.shape
    width_out, width_in = matrix if contract == "in" else reversed(matrix)
    shape = (num_groups, 1, width_out, width_in)
    if expected_rows is None:
        expected_rows = rows.shape[0]
    tiles = choose_row_tiles(_problem(expected_rows, shape, rows.dtype, output_dtype), device).tiles

    @jax.custom_batching.sequential_vmap
    def call(rows, weights, groups, bias):
        padded = _whole_tiles(rows)
        result, _ = multiply_rows(
            padded,
            weights[:, None],
            VisitTable.of(groups, padded.shape[0], tiles.rows, zero_outside=zero_outside),
            tiles=tiles,
            contract=contract,
            bias=None if bias is None else bias[:, None],
            output_dtype=output_dtype,
            device=device,
        )
        return result[: rows.shape[0], :width_out]

    return call(rows, weights, groups, bias)


def _problem(
    expected_rows: int,
    weights_shape: tuple[int, ...],
    dtype: DTypeLike,
    output_dtype: DTypeLike,
    kept: bool = False,
    row_scale: Array | None = None,
) -> RowsProblem:
    num_groups, projections, width_out, width_in = weights_shape
    return RowsProblem(
        num_rows=expected_rows,
        num_groups=num_groups,
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        kept=kept,
        scaled_rows=0 if row_scale is None else row_scale.shape[0],
        itemsize=jnp.dtype(dtype).itemsize,
        output_itemsize=jnp.dtype(output_dtype).itemsize,
    )


def _whole_tiles(rows: Float[Array, "M D"]) -> Float[Array, "Mpadded D"]:
    """Rows up to a multiple of 16; a copy only if there are not as many."""
    return jnp.pad(rows, ((0, -rows.shape[0] % ROW_ALIGNMENT), (0, 0)))
