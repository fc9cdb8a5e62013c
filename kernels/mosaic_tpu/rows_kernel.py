"""Rows times the matrix of their group, with everything that can be done before the result is stored.

A program walks over columns of the result, and for each over the visits (`schedule.py`). Weights arrive by the grid's own
pipeline: while successive visits share a group they stay, so that every weight is read once. Rows are copied in, and results
out, by hand, because both start at any multiple of 16 rows and are as many as the group still has; the rows of the next visit
arrive, and the results of the last one leave, while this one is multiplied. What is copied has the contracted dimension whole.

Each pass over the visits reads all rows. Where that is much, a pass computes several tiles of columns, one after the other for
each group (`RowTiles.column_tiles`): weights are still read once, and rows of a group that is one visit once for all of them.

How many rows a visit multiplies follows from the rows it has (`RowTiles.remainders`). Rows beyond the group's may be anything,
NaN too: a row of a product depends on no other row. Only the first and the last 16 rows of a visit can hold rows of other
groups, and only they are masked.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float

from ..activations import Activation
from ..device import TpuDevice
from ..varying import shape_varying_like
from .epilogue import column_of
from .limits import LANES, check_row_tiles, compiler_vmem_limit_bytes, rereads_rows, rows_vmem_bytes
from .panels import Operands, Problem, multiply_panel
from .schedule import ROW_ALIGNMENT, VisitTable
from .shared_rows import aligned, mask_ends, whole_rows
from .steps import StepTable, Walk
from .tiles import RowTiles

Ref = Any


def multiply_rows(
    rows: Float[Array, "M Dpadded"],
    weights: Float[Array, "G P N D"] | Float[Array, "G P D N"],
    table: VisitTable,
    *,
    tiles: RowTiles,
    contract: Literal["in", "out"] = "in",
    bias: Float[Array, "G P N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    keep_projected: bool = False,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> tuple[Float[Array, "M Npadded"], Float[Array, "P M Npadded"] | None]:
    """row_scale * activation(rows @ matrices + bias) for the rows of every visit, accumulated in float32.

    Args:
        rows: bfloat16 or float32; M is a multiple of 16. Columns from D on are not looked at: padding of a result before it.
        weights: of the same dtype. (out, in) matrices, of which `contract="in"` contracts the last axis; "out" contracts the
            axis before it, which is the gradient of rows.
        table: the visits, made with `tiles.rows`.
        tiles: see `RowTiles`.
        contract: see `weights`.
        bias: added to each projection in float32.
        activation: of the P projections (2: gate and up); None if there is one projection, which is then the result.
        row_scale: float32 factor of each row of the result.
        keep_projected: also return what enters the activation, for the backward pass.
        output_dtype: bfloat16 or float32.
        device: what the kernel runs on.

    Returns:
        The result, and the projections if they are kept. Their columns are padded to a multiple of 128, of which those from N
        on hold anything. Rows that no visit writes hold anything, as do rows of no group among 16 of which a group has some:
        zeros.

    Raises:
        ValueError: tiles that don't fit each other or the device.
    """
    num_rows, width_in = rows.shape
    _, projections, *matrix = weights.shape
    depth, width_out = reversed(matrix) if contract == "in" else matrix
    padded_out = pl.cdiv(width_out, LANES) * LANES
    dtype, output_dtype = rows.dtype, jnp.dtype(output_dtype)
    parts = 1 + (projections if keep_projected else 0)
    needed_bytes = rows_vmem_bytes(
        tiles,
        width_in=width_in,
        projections=projections,
        kept=keep_projected,
        scaled_rows=0 if row_scale is None else num_rows,
        itemsize=dtype.itemsize,
        output_itemsize=output_dtype.itemsize,
        device=device,
    )
    check_row_tiles(tiles, device, needed_bytes)
    all_tiles = pl.cdiv(padded_out, tiles.columns)
    if all_tiles % tiles.column_tiles:
        raise ValueError(f"column_tiles={tiles.column_tiles} must divide the {all_tiles} tiles of {padded_out} columns")
    steps = StepTable.of(table, tiles.column_tiles) if tiles.column_tiles > 1 else None
    tables = (*table, *(steps or ()))
    problem = Problem(tiles, projections, contract, activation, depth, padded_out, dtype.itemsize, device)

    def matrix_block(column: Array, step: Array, *tables: Ref) -> tuple[Any, ...]:
        walk = Walk.of(tables, tiles)
        matrix, tile = walk.table.matrix(walk.visit(step)), walk.tile(column, step)
        return (matrix, 0, tile, 0) if contract == "in" else (matrix, 0, 0, tile)

    def bias_block(column: Array, step: Array, *tables: Ref) -> tuple[Any, ...]:
        walk = Walk.of(tables, tiles)
        return walk.table.group[walk.visit(step)], 0, walk.tile(column, step)

    block = (tiles.columns, depth) if contract == "in" else (depth, tiles.columns)
    in_specs = {
        "rows": pl.BlockSpec(memory_space=pl.ANY),
        "weights": pl.BlockSpec((None, projections, *block), matrix_block),
    }
    operands = {"rows": rows, "weights": weights}
    if bias is not None:
        in_specs["bias"] = pl.BlockSpec((None, projections, tiles.columns), bias_block)
        operands["bias"] = bias.astype(jnp.float32)
    if row_scale is not None:
        operands["row_scale"] = scale = _along_lanes(row_scale, tiles)
        in_specs["row_scale"] = pl.BlockSpec(scale.shape, lambda *_: (0, 0))
    outputs = {"result": shape_varying_like((num_rows, padded_out), output_dtype, rows)}
    if keep_projected:
        outputs["projected"] = shape_varying_like((projections, num_rows, padded_out), output_dtype, rows)
    scratch = {
        "rows_buffer": pltpu.VMEM((2, tiles.rows, width_in), dtype),
        "result_buffer": pltpu.VMEM((2, parts, tiles.rows, tiles.columns), output_dtype),
        "shared_rows": pltpu.VMEM((parts, ROW_ALIGNMENT, tiles.column_tiles * tiles.columns), output_dtype),
        "fetched": pltpu.SemaphoreType.DMA((2,)),
        "stored": pltpu.SemaphoreType.DMA(()),
    }
    if rereads_rows(dtype.itemsize, device):
        scratch["zeros"] = pltpu.SMEM((problem.products,), jnp.int32)
    if row_scale is not None:
        scratch["scale_buffer"] = pltpu.VMEM((tiles.rows + LANES, 1), jnp.float32)
    names = (*operands, *outputs, *scratch)

    def grouped_rows(*refs: Ref) -> None:
        walk = Walk.of(refs[: len(tables)], tiles)
        _visit(problem, walk, **dict(zip(names, refs[len(tables) :], strict=True)))

    results = pl.pallas_call(
        grouped_rows,
        out_shape=tuple(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(all_tiles // tiles.column_tiles, (steps or table).count[0]),
            in_specs=tuple(in_specs.values()),
            out_specs=tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in outputs),
            scratch_shapes=tuple(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=compiler_vmem_limit_bytes(device)
        ),
        name="grouped_rows",
    )(*tables, *operands.values())
    return results[0], results[1] if keep_projected else None


def _visit(
    problem: Problem,
    walk: Walk,
    *,
    rows: Ref,
    weights: Ref,
    bias: Ref | None = None,
    row_scale: Ref | None = None,
    result: Ref,
    projected: Ref | None = None,
    rows_buffer: Ref,
    result_buffer: Ref,
    shared_rows: Ref,
    fetched: Ref,
    stored: Ref,
    zeros: Ref | None = None,
    scale_buffer: Ref | None = None,
) -> None:
    """One step of the grid: one visit, for the columns of one tile."""
    table, step, count = walk.table, pl.program_id(1), walk.count
    visit, slot = walk.visit(step), walk.slot(step)
    result_slot = slot if walk.steps is None else lax.rem(step, 2)
    destinations = [result] if projected is None else [result, *(projected.at[p] for p in range(problem.projections))]

    def fetch(step: Array, slot: Array) -> _Copies:
        visit = walk.visit(step)
        size = whole_rows(table.last[visit])
        source, target = rows.at[aligned(table.source[visit], size)], rows_buffer.at[slot, pl.ds(0, size)]
        is_copied = size > 0 if walk.steps is None else (size > 0) & walk.steps.brings_rows(step)
        return _Copies([(is_copied, [pltpu.make_async_copy(source, target, fetched.at[slot])])])

    def store(step: Array, slot: Array) -> _Copies:
        return _store_copies(problem, walk, step, result_buffer.at[slot], destinations, stored)

    @pl.when(step == 0)
    def _():
        fetch(step, slot).start()
        shared_rows[...] = jnp.zeros_like(shared_rows)
        if zeros is not None:
            for product in range(problem.products):
                zeros[product] = 0

    @pl.when(step + 1 < count)
    def _():
        fetch(step + 1, 1 - slot).start()

    fetch(step, slot).wait()
    scale = None if row_scale is None else _scale_of(row_scale, scale_buffer, table.row[visit], table.last[visit])
    operands = Operands(rows_buffer.at[slot], weights, bias, scale, zeros)
    _multiply(problem, operands, result_buffer.at[result_slot], table.last[visit])
    shared = shared_rows
    if walk.steps is not None:
        first_column = pl.multiple_of(walk.steps.column[step] * problem.tiles.columns, LANES)
        shared = shared_rows.at[:, :, pl.ds(first_column, problem.tiles.columns)]
    mask_ends(result_buffer.at[result_slot], shared, table.first[visit], table.last[visit])

    @pl.when(step > 0)
    def _():
        store(step - 1, 1 - result_slot).wait()

    store(step, result_slot).start()

    @pl.when(step == count - 1)
    def _():
        store(step, result_slot).wait()


class _Copies:
    """Copies that are started, and waited for, together: each list of them if its condition holds."""

    def __init__(self, copies: Sequence[tuple[Array, Sequence[Any]]]) -> None:
        self._copies = copies

    def _each(self, act: Callable[[Any], None]) -> None:
        for condition, copies in self._copies:

            @pl.when(condition)
            def _(copies=copies):
                for copy in copies:
                    act(copy)

    def start(self) -> None:
        self._each(lambda copy: copy.start())

    def wait(self) -> None:
        self._each(lambda copy: copy.wait())


def _store_copies(
    problem: Problem, walk: Walk, step: Array, buffer: Ref, destinations: Sequence[Ref], semaphore: Ref
) -> _Copies:
    """From the buffer of results to device memory; the last tile may have fewer columns than the others."""
    visit = walk.visit(step)
    size = pl.multiple_of(walk.table.stored[visit], ROW_ALIGNMENT)
    row, tile = walk.table.row[visit], walk.tile(pl.program_id(0), step)
    columns, last_columns = problem.tiles.columns, problem.last_columns
    is_last = tile == pl.num_programs(0) * problem.tiles.column_tiles - 1

    def copies(width: int) -> list[Any]:
        at = (aligned(row, size), pl.ds(pl.multiple_of(tile * columns, LANES), width))
        return [
            pltpu.make_async_copy(buffer.at[part, pl.ds(0, size), pl.ds(0, width)], destination.at[at], semaphore)
            for part, destination in enumerate(destinations)
        ]

    if last_columns == columns:
        return _Copies([(size > 0, copies(columns))])
    return _Copies(
        [
            ((size > 0) & jnp.logical_not(is_last), copies(columns)),
            ((size > 0) & is_last, copies(last_columns)),
        ]
    )


def _multiply(problem: Problem, operands: Operands, buffer: Ref, last: Array) -> None:
    """Write the results of the rows before `last`, and of some after them; zeros for a visit without rows."""
    tiles = problem.tiles
    remainders = tiles.remainders
    largest = max((*remainders, tiles.chunk))
    # As many chunks as leave what some remainder covers; a chunk is one as well.
    chunks = lax.div(jnp.maximum(last - largest, 0) + (tiles.chunk - 1), tiles.chunk)
    rest = last - chunks * tiles.chunk
    all_chunks, lower = chunks, 0
    for size in sorted((*remainders, tiles.chunk)):
        is_covering = (rest > lower) & (rest <= size)
        if size == tiles.chunk:
            all_chunks = chunks + is_covering.astype(jnp.int32)
        else:

            @pl.when(is_covering)
            def _(size=size):
                _multiply_at_once(problem, operands, buffer, pl.multiple_of(chunks * tiles.chunk, tiles.chunk), size)

        lower = size

    @pl.loop(0, all_chunks)
    def _(chunk):
        _multiply_at_once(problem, operands, buffer, pl.multiple_of(chunk * tiles.chunk, tiles.chunk), tiles.chunk)

    @pl.when(last == 0)
    def _():
        @pl.loop(0, tiles.rows, step=ROW_ALIGNMENT)
        def _(row):
            some = aligned(row, ROW_ALIGNMENT)
            buffer[:, some] = jnp.zeros((buffer.shape[0], ROW_ALIGNMENT, tiles.columns), buffer.dtype)


def _multiply_at_once(problem: Problem, operands: Operands, buffer: Ref, first_row: Array, size: int) -> None:
    """The results of `size` rows from `first_row` on, panel by panel of columns."""
    columns, panel = problem.tiles.columns, problem.panel
    if panel >= columns:
        multiply_panel(problem, operands, buffer, first_row, size, 0, columns)
        return

    @pl.loop(0, columns // panel)
    def _(index):
        first_column = pl.multiple_of(index * panel, LANES)
        multiply_panel(problem, operands, buffer, first_row, size, first_column, panel)

    if rest := columns % panel:
        multiply_panel(problem, operands, buffer, first_row, size, columns - rest, rest)


def _along_lanes(row_scale: Float[Array, "M"], tiles: RowTiles) -> Float[Array, "tiles 128"]:
    """Scales in lines of 128, with as many after the last row as a visit may read."""
    length = row_scale.shape[0] + tiles.rows + LANES
    padding = pl.cdiv(length, LANES) * LANES - row_scale.shape[0]
    return jnp.pad(row_scale.astype(jnp.float32), (0, padding)).reshape(-1, LANES)


def _scale_of(row_scale: Ref, buffer: Ref, row: Array, last: Array) -> Callable[[Array, int], Float[Array, "size 1"]]:
    """Turn the scales of a visit's rows into a column in `buffer`; the function returned reads them there."""
    first_line, shift = lax.div(row, LANES), lax.rem(row, LANES)

    @pl.loop(0, lax.div(shift + last + (LANES - 1), LANES))
    def _(line):
        turned = column_of(row_scale[pl.ds(first_line + line, 1), :])
        buffer[pl.ds(pl.multiple_of(line * LANES, LANES), LANES), :] = turned

    return lambda first_row, size: buffer[aligned(shift + first_row, size), :]
