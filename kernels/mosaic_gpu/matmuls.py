"""The three products of a grouped matmul and its gradient, on whichever GPU: choose kernel and tiles, build tables, call.

`expected_rows`, where it is an argument, is about how many of the rows are those of a group, from which kernel and tiles are
chosen; None: all of them.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..activations import Activation
from ..device import GpuDevice
from ..groups import Groups
from ..groups import sum_groups as bias_gradient
from ..integers import in_32_bits
from ..varying import varying_like
from . import schedule, weights_gradient_product
from .choice import ChosenTiles, choose_tiles, streams_weights
from .limits import SWIZZLES
from .rows_product import multiply_rows
from .schedule import Alignment, TileTable
from .stream_kernel import stream_weights

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
    device: GpuDevice,
) -> tuple[Literal["rows", "stream"], ChosenTiles]:
    """Kernel and tiles of `multiply`, for weights of shape [G, P, N, D]."""
    num_groups, projections, width_out, width_in = weights_shape
    kernel = "stream" if streams_weights(expected_rows, num_groups, device) else "rows"
    return kernel, choose_tiles(
        kernel,
        num_rows=expected_rows,
        num_groups=num_groups,
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        dtype=jnp.dtype(dtype),
        output_dtype=output_dtype,
        device=device,
    )


@in_32_bits
def multiply(
    rows: Float[Array, "M D"],
    weights: Float[Array, "S P N D"],
    groups: Groups,
    *,
    first_matrix: int | Int[Array, ""] = 0,
    bias: Float[Array, "G P N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    expected_rows: int | None = None,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Float[Array, "M N"]:
    """row_scale * activation(rows @ matrices + bias) for rows in the aligned layout.

    Rows of no group hold anything afterwards. The matrices of the G groups are those from `first_matrix` on; `bias` has those of
    the groups alone. See `rows_product.multiply_rows`.
    """
    expected_rows = rows.shape[0] if expected_rows is None else expected_rows
    shape = (groups.sizes.shape[0], *weights.shape[1:])
    kernel, chosen = chosen_for_forward(expected_rows, shape, rows.dtype, output_dtype, device)
    if kernel == "rows":
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
    result = stream_weights(
        rows,
        _side_by_side(weights),
        TileTable.of(groups, rows.shape[0], chosen.tiles.rows, "aligned", first_matrix=first_matrix),
        tiles=chosen.tiles,
        projections=weights.shape[1],
        bias=None if bias is None else _side_by_side(bias),
        activation=activation,
        row_scale=row_scale,
        output_dtype=output_dtype,
        device=device,
    )
    return varying_like(result, rows)


@in_32_bits
def multiply_and_keep(
    rows: Float[Array, "M D"],
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
    device: GpuDevice,
) -> tuple[Float[Array, "M N"], Float[Array, "M P N"] | None]:
    """The same by the kernel for many rows, which can also return what enters the activation, for the backward pass."""
    _, projections, width_out, width_in = weights.shape
    chosen = choose_tiles(
        "rows",
        num_rows=rows.shape[0] if expected_rows is None else expected_rows,
        num_groups=groups.sizes.shape[0],
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        dtype=rows.dtype,
        output_dtype=output_dtype,
        device=device,
    )
    result, projected = multiply_rows(
        rows,
        _side_by_side(weights),
        TileTable.of(groups, rows.shape[0], chosen.tiles.rows, "aligned", first_matrix=first_matrix),
        tiles=chosen.tiles,
        projections=projections,
        bias=None if bias is None else _side_by_side(bias),
        activation=activation,
        row_scale=row_scale,
        keep_projected=keep_projected,
        zero_groups=False,
        exact_rows=False,
        output_dtype=output_dtype,
        device=device,
    )
    return varying_like(result, rows), None if projected is None else varying_like(projected, rows)


@in_32_bits
def multiply_compact(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G N D"] | Float[Array, "G D N"],
    groups: Groups,
    *,
    contract: Literal["in", "out"] = "in",
    bias: Float[Array, "G N"] | None = None,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Float[Array, "M N"]:
    """Rows @ matrices + bias for groups that lie one after the other; rows before and after them become zero unread.

    With `contract="out"` the middle axis of the weights is contracted: the gradient of rows. Few rows per group, and results
    that cannot be stored row by row, are computed in the aligned layout: rows are moved there and back.
    """
    num_rows, num_groups = rows.shape[0], weights.shape[0]
    width_in, width_out = (weights.shape[2], weights.shape[1]) if contract == "in" else weights.shape[1:]
    streamed = contract == "in" and streams_weights(num_rows, num_groups, device)
    if streamed or width_out * jnp.dtype(output_dtype).itemsize % SWIZZLES[0]:
        alignment = Alignment.of(groups, num_rows)
        common: dict[str, Any] = dict(expected_rows=num_rows, output_dtype=output_dtype, device=device)
        aligned_rows = rows[alignment.source]
        if contract == "out":
            result = rows_gradient(aligned_rows, weights, alignment.groups, **common)
        else:
            bias = None if bias is None else bias[:, None]
            result = multiply(aligned_rows, weights[:, None], alignment.groups, bias=bias, **common)
        return alignment.to_compact(result)
    chosen = choose_tiles(
        "rows" if contract == "in" else "rows_gradient",
        num_rows=num_rows,
        num_groups=num_groups,
        width_in=width_in,
        width_out=width_out,
        dtype=rows.dtype,
        output_dtype=output_dtype,
        device=device,
    )
    table = TileTable.of(_with_surroundings(groups, num_rows), num_rows, chosen.tiles.rows, "compact")
    group = jnp.where(table.group > num_groups, 0, table.group) - 1
    result, _ = multiply_rows(
        rows,
        weights,
        table._replace(group=group),
        tiles=chosen.tiles,
        contract=contract,
        bias=bias,
        zero_groups=True,
        exact_rows=True,
        output_dtype=output_dtype,
        device=device,
    )
    return varying_like(result, rows)


@in_32_bits
def rows_gradient(
    cotangent: Float[Array, "M N"],
    weights: Float[Array, "G N D"],
    groups: Groups,
    *,
    expected_rows: int | None = None,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Float[Array, "M D"]:
    """Cotangent @ matrices, in the aligned layout: the gradient of `rows @ matrices.T`. Rows of no group hold anything."""
    chosen = choose_tiles(
        "rows_gradient",
        num_rows=cotangent.shape[0] if expected_rows is None else expected_rows,
        num_groups=weights.shape[0],
        width_in=weights.shape[1],
        width_out=weights.shape[2],
        dtype=cotangent.dtype,
        output_dtype=output_dtype,
        device=device,
    )
    result, _ = multiply_rows(
        cotangent,
        weights,
        TileTable.of(groups, cotangent.shape[0], chosen.tiles.rows, "aligned"),
        tiles=chosen.tiles,
        contract="out",
        zero_groups=False,
        exact_rows=False,
        output_dtype=output_dtype,
        device=device,
    )
    return varying_like(result, cotangent)


@in_32_bits
def weights_gradient(
    cotangent: Float[Array, "M N"],
    rows: Float[Array, "M D"],
    groups: Groups,
    *,
    expected_rows: int | None = None,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Float[Array, "G N D"]:
    """cotangent.T @ rows over the rows of each group; zero for a group without rows. Other rows may be NaN."""
    chosen = choose_tiles(
        "weights_gradient",
        num_rows=rows.shape[0] if expected_rows is None else expected_rows,
        num_groups=groups.sizes.shape[0],
        width_in=rows.shape[1],
        width_out=cotangent.shape[1],
        dtype=rows.dtype,
        output_dtype=output_dtype,
        device=device,
    )
    result = weights_gradient_product.weights_gradient(
        cotangent, rows, groups, tiles=chosen.tiles, output_dtype=output_dtype, device=device
    )
    return varying_like(result, rows)


def _side_by_side(array: Array) -> Array:
    """[G, P, ...] as [G * P, ...]."""
    return array.reshape(-1, *array.shape[2:])


def _with_surroundings(groups: Groups, num_rows: int) -> Groups:
    """The groups, and one more before and one after them for the rows that belong to none."""
    end = groups.starts[-1] + groups.sizes[-1]
    starts = jnp.concatenate([jnp.zeros_like(end)[None], groups.starts, end[None]])
    sizes = jnp.concatenate([groups.starts[:1], groups.sizes, (num_rows - end)[None]])
    return Groups(starts, sizes)
