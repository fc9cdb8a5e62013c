"""The gradient of a grouped matmul with respect to its weights: a matmul grouped over its contracted dimension.

A program walks over tiles of a gradient, and for each over the visits (`schedule.py`), groups without rows included. Both
operands are copied in by hand, as many rows as the group still has, the next visit's while this one's are multiplied; gradients
leave by the grid's own pipeline when the group changes.

A group that fits one visit, as most do, is multiplied straight into its gradient; products of larger groups are summed in
float32 and join the last visit's. Contracting a partly filled matrix unit takes as long as contracting a full one, so the last
visit contracts a multiple of its depth. The rows that this adds, and rows of other groups among the first and the last 16, are
set to zero in both operands, for they may hold NaN.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float

from ..device import TpuDevice
from ..groups import Groups
from ..varying import shape_varying_like, varying_like
from .limits import LANES, compiler_vmem_limit_bytes
from .rounding import round_up
from .schedule import ROW_ALIGNMENT, VisitTable
from .shared_rows import aligned, whole_rows
from .weights_gradient_tiles import WeightsGradientTiles, check_weights_gradient_tiles

Ref = Any
STRIP = 512
"""Columns of the gradient that are multiplied at once, if a tile's are a multiple of it."""


def weights_gradient(
    cotangent: Float[Array, "M Npadded"],
    rows: Float[Array, "M Dpadded"],
    groups: Groups,
    *,
    tiles: WeightsGradientTiles,
    widths: tuple[int, int] | None = None,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> Float[Array, "G N D"]:
    """`cotangent[r].T @ rows[r]` over the rows r of each group, accumulated in float32 and rounded once; zero for an empty group.

    Rows outside the groups are never used, whatever they hold, NaN included. Operands are padded, which copies them, only
    where M is no multiple of 16.

    Args:
        cotangent: gradient with respect to the product, bfloat16 or float32.
        rows: the rows that were multiplied, of the same dtype.
        groups: where the groups lie; they may start at any row, and have any size.
        tiles: tile sizes; see `default_weights_gradient_tiles`.
        widths: N and D, if the operands have columns beyond these, which then may hold anything.
        output_dtype: bfloat16 or float32.
        device: what the kernel runs on.

    Raises:
        ValueError: operands of different numbers of rows; tiles that are not legal, or take more memory than there is.
        TypeError: other dtypes.
    """
    output_dtype = jnp.dtype(output_dtype)
    _check(cotangent, rows, output_dtype)
    check_weights_gradient_tiles(tiles, rows.dtype.itemsize, output_dtype.itemsize, device)
    width_out, width_in = widths or (cotangent.shape[1], rows.shape[1])
    num_groups, num_rows = groups.sizes.shape[0], rows.shape[0]
    if num_groups == 0 or num_rows == 0:
        return varying_like(jnp.zeros((num_groups, width_out, width_in), output_dtype), rows)
    cotangent, rows = _whole_rows(cotangent), _whole_rows(rows)
    table = VisitTable.of(groups, rows.shape[0], tiles.rows, visit_empty=True)
    scratch = {
        "sums": pltpu.VMEM((tiles.out_columns, tiles.in_columns), jnp.float32),
        "cotangent_buffer": pltpu.VMEM((2, tiles.rows, tiles.out_columns), cotangent.dtype),
        "rows_buffer": pltpu.VMEM((2, tiles.rows, tiles.in_columns), rows.dtype),
        "fetched": pltpu.SemaphoreType.DMA((2,)),
    }
    names = ("cotangent", "rows", "gradient", *scratch)

    def grouped_weights_gradient(*refs: Ref) -> None:
        _visit(tiles, VisitTable(*refs[: len(table)]), **dict(zip(names, refs[len(table) :], strict=True)))

    return pl.pallas_call(
        grouped_weights_gradient,
        out_shape=shape_varying_like((num_groups, width_out, width_in), output_dtype, rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(pl.cdiv(width_out, tiles.out_columns), pl.cdiv(width_in, tiles.in_columns), table.count[0]),
            in_specs=(pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)),
            out_specs=pl.BlockSpec(
                (None, tiles.out_columns, tiles.in_columns),
                lambda out_tile, in_tile, visit, group, *_: (group[visit], out_tile, in_tile),
            ),
            scratch_shapes=tuple(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=compiler_vmem_limit_bytes(device),
        ),
        name="grouped_weights_gradient",
    )(*table, cotangent, rows)


def _visit(
    tiles: WeightsGradientTiles,
    table: VisitTable,
    *,
    cotangent: Ref,
    rows: Ref,
    gradient: Ref,
    sums: Ref,
    cotangent_buffer: Ref,
    rows_buffer: Ref,
    fetched: Ref,
) -> None:
    """One step of the grid: one visit, for one tile of the gradient."""
    visit, count = pl.program_id(2), table.count[0]
    slot = lax.rem(visit, 2)
    first, last, group = table.first[visit], table.last[visit], table.group[visit]

    def fetch(which: Array, slot: Array, act: Callable[[Any], None]) -> None:
        """Start or await the copies of a visit's rows, of the columns that this tile needs."""
        size = whole_rows(table.last[which])
        own_rows = aligned(table.source[which], size)

        @pl.when(table.last[which] > table.first[which])
        def _():
            for operand, buffer, axis in ((cotangent, cotangent_buffer, 0), (rows, rows_buffer, 1)):
                _each_width(
                    operand.shape[1],
                    buffer.shape[2],
                    axis,
                    lambda own_columns, width, operand=operand, buffer=buffer: act(
                        pltpu.make_async_copy(
                            operand.at[own_rows, own_columns],
                            buffer.at[slot, pl.ds(0, size), pl.ds(0, width)],
                            fetched.at[slot],
                        )
                    ),
                )

    @pl.when(visit == 0)
    def _():
        fetch(visit, slot, lambda copy: copy.start())

    @pl.when(visit + 1 < count)
    def _():
        fetch(visit + 1, 1 - slot, lambda copy: copy.start())

    fetch(visit, slot, lambda copy: copy.wait())

    depth = lax.div(last + (tiles.depth - 1), tiles.depth) * tiles.depth
    starts_group = (visit == 0) | (table.group[jnp.maximum(visit - 1, 0)] != group)
    ends_group = (visit == count - 1) | (table.group[jnp.minimum(visit + 1, count - 1)] != group)
    operands = cotangent_buffer.at[slot], rows_buffer.at[slot]

    @pl.when(last == first)
    def _():
        @pl.loop(0, tiles.out_columns, step=ROW_ALIGNMENT)
        def _(row):
            some = aligned(row, ROW_ALIGNMENT)
            gradient[some] = jnp.zeros((ROW_ALIGNMENT, tiles.in_columns), gradient.dtype)

    @pl.when(last > first)
    def _():
        for operand in operands:
            _mask(operand, first, last, depth)

    @pl.when((last > first) & jnp.logical_not(ends_group))
    def _():
        _multiply(operands, tiles.rows, starts_group, sums, sums)

    for size in tiles.depths:

        @pl.when((last > first) & ends_group & (depth == size))
        def _(size=size):
            _multiply(operands, size, starts_group, sums, gradient)


def _each_width(width: int, columns: int, axis: int, act: Callable[[Any, int], None]) -> None:
    """Call with this tile's columns, of which the last tile may have fewer than the others.

    These go up to a multiple of 128, as far as an array of any width reaches in device memory: what the columns beyond its width
    hold enters only columns of the gradient that are not stored.
    """
    tile, last_tile = pl.program_id(axis), pl.cdiv(width, columns) - 1
    last_width = round_up(width - last_tile * columns, LANES)
    own_columns = pl.multiple_of(tile * columns, LANES)
    if last_width == columns:
        act(pl.ds(own_columns, columns), columns)
        return

    @pl.when(tile < last_tile)
    def _():
        act(pl.ds(own_columns, columns), columns)

    @pl.when(tile == last_tile)
    def _():
        act(pl.ds(own_columns, last_width), last_width)


def _mask(operand: Ref, first: Array, last: Array, depth: Array) -> None:
    """Set the rows before `first`, and those from `last` to `depth`, to zero; `first` is less than 16."""
    shape = (ROW_ALIGNMENT, operand.shape[1])
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    tail = lax.rem(last, ROW_ALIGNMENT)

    def keep(start: Array | int, kept: Array) -> None:
        some = aligned(jnp.asarray(start), ROW_ALIGNMENT)
        # Masks of 16 rows are those of 32 bits.
        operand[some] = jnp.where(kept, operand[some].astype(jnp.float32), 0).astype(operand.dtype)

    @pl.when(first > 0)
    def _():
        keep(0, row >= first)

    @pl.when(tail > 0)
    def _():
        keep(last - tail, row < tail)

    @pl.loop(whole_rows(last), depth, step=ROW_ALIGNMENT)
    def _(start):
        some = aligned(start, ROW_ALIGNMENT)
        operand[some] = jnp.zeros(shape, operand.dtype)


def _multiply(operands: tuple[Ref, Ref], depth: int, starts_group: Array, sums: Ref, result: Ref) -> None:
    """Write the sum over `depth` rows, and over the visits before to the same group."""
    cotangent, rows = operands
    columns = rows.shape[1]
    strip = STRIP if columns % STRIP == 0 else columns
    # One pass of a matrix unit rounds float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else lax.Precision.DEFAULT
    for start in range(0, columns, strip):
        own_columns = pl.ds(start, strip)
        product = lax.dot_general(
            cotangent[:depth],
            rows[:depth, own_columns],
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        before = jnp.where(starts_group, jnp.float32(0), sums[:, own_columns])
        result[:, own_columns] = (before + product).astype(result.dtype)


def _whole_rows(operand: Float[Array, "M N"]) -> Float[Array, "Mpadded N"]:
    """With as many rows as copies can address; the same array if it has."""
    padding = -operand.shape[0] % ROW_ALIGNMENT
    return jnp.pad(operand, ((0, padding), (0, 0))) if padding else operand


def _check(cotangent: Array, rows: Array, output_dtype: jnp.dtype) -> None:
    legal = (jnp.bfloat16, jnp.float32)
    if rows.dtype not in legal or cotangent.dtype != rows.dtype:
        raise TypeError(
            f"cotangent and rows must both be bfloat16 or both float32, got {cotangent.dtype} and {rows.dtype}"
        )
    if output_dtype not in legal:
        raise TypeError(f"output_dtype must be bfloat16 or float32, got {output_dtype}")
    if cotangent.shape[0] != rows.shape[0]:
        raise ValueError(f"cotangent and rows must have as many rows, got {cotangent.shape[0]} and {rows.shape[0]}")
