"""Rows times the matrix of their group, on Hopper: the kernel for many rows per group.

One block per multiprocessor walks over output tiles. Its first two warpgroups multiply; the third copies rows and weights to
shared memory, several steps ahead. Steps are counted over all tiles of a block, so the copies for the next tile are under way
while the results of this one are activated and stored.

Gate and up lie side by side in shared memory and are multiplied by one instruction; the activation is applied to its
accumulator, so what enters the activation never reaches memory unless it is asked for.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Float

from ..activations import Activation
from ..device import GpuDevice
from .compiler_params import OWN_BARRIERS
from .epilogue import activate, load_vector
from .limits import SWIZZLES, swizzle_bytes
from .padding import pad_to_multiples
from .ref import Ref
from .row_tiles import WARPGROUP_ROWS, WARPGROUPS, check_row_tiles, column_parts_of
from .schedule import ROW_ALIGNMENT, TileTable, num_tiles
from .stores import store_rows, swizzled
from .tiles import RowTiles

COPYING_REGISTERS, MULTIPLYING_REGISTERS = 56, 224
"""Per thread; what two warpgroups that multiply leave to one that copies. It spills with 40 for some shapes."""


def multiply_rows(
    rows: Float[Array, "M D"],
    weights: Float[Array, "GP N D"] | Float[Array, "G D N"],
    table: TileTable,
    *,
    tiles: RowTiles,
    projections: int = 1,
    contract: Literal["in", "out"] = "in",
    bias: Float[Array, "GP N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    keep_projected: bool = False,
    zero_groups: bool,
    exact_rows: bool,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Array | tuple[Array, Array]:
    """row_scale * activation(rows @ matrices + bias), the matrices being those of each row's group.

    Accumulates, adds, activates and scales in float32, then rounds once to `output_dtype`.

    Args:
        rows: bfloat16 or float16, D a multiple of 16. M is anything with `exact_rows`, otherwise a multiple of 8.
        weights: of the same dtype, N a multiple of 16. With `contract="in"` the `projections` matrices of each group, (out, in):
            their last axis is contracted (forward). With "out" one matrix per group, whose middle axis is contracted (gradient
            of rows).
        table: tiles of `tiles.rows` rows.
        tiles: tile sizes, legal by `check_row_tiles`.
        projections: matrices per group whose results meet in the activation: 2 (0 = gate, 1 = up) or 1.
        contract: see `weights`.
        bias: float32, bfloat16 or float16, added to each projection.
        activation: of the projections; None if there is one projection, which is then the result.
        row_scale: float32 factor of each row of the result.
        keep_projected: also return what enters the activation, for the backward pass.
        zero_groups: whether the table may hold tiles of group -1, whose rows become zero without anything being read.
        exact_rows: store no row outside a tile's own (compact layout), for which rows of the result must be multiples of 128
            bytes; otherwise whole multiples of 8 rows (aligned layout).
        output_dtype: bfloat16, float16 or float32.
        device: what the kernel runs on.

    Returns:
        [M, N]; with `keep_projected` also [M, projections, N]. Rows of no tile are not written: they hold
        anything, NaN too.

    Raises:
        ValueError: tiles that don't fit, or widths that bulk copies cannot address.
    """
    num_rows, width_in = rows.shape
    width_out = weights.shape[1] if contract == "in" else weights.shape[2]
    check_row_tiles(tiles, projections, rows.dtype.itemsize, device)
    column_parts = column_parts_of(tiles)
    part_columns = tiles.columns // column_parts
    dtype, output_dtype = rows.dtype, jnp.dtype(output_dtype)
    weights_step = (projections * part_columns, tiles.depth) if contract == "in" else (tiles.depth, part_columns)
    copies = 1 + column_parts * (projections if contract == "in" else 1)
    in_swizzle, out_swizzle = swizzle_bytes(width_in, dtype.itemsize), swizzle_bytes(width_out, dtype.itemsize)
    # One for both operands, as the instruction wants it; contracting "in", both have rows of width_in.
    operand_swizzle = in_swizzle if contract == "in" else min(in_swizzle, out_swizzle)
    result_swizzle = swizzle_bytes(width_out, output_dtype.itemsize)
    if exact_rows and result_swizzle < SWIZZLES[0]:
        raise ValueError(
            f"single rows of the result can be stored if they are multiples of {SWIZZLES[0]} bytes, got {width_out} columns of"
            f" {output_dtype}"
        )
    operands = {
        **table._asdict(),
        "rows": pad_to_multiples(rows, ROW_ALIGNMENT, 1),  # copies address 8 at a time; those added are of no group
        "weights": weights,
        "bias": bias,
        "row_scale": None if row_scale is None else jnp.pad(row_scale.astype(jnp.float32), (0, tiles.rows)),
    }
    operands = {name: operand for name, operand in operands.items() if operand is not None}
    outputs = {"result": jax.ShapeDtypeStruct((num_rows, width_out), output_dtype)}
    if keep_projected:
        outputs["projected"] = jax.ShapeDtypeStruct((num_rows, projections, width_out), output_dtype)
    problem = _Problem(
        tiles=tiles,
        projections=projections,
        contract=contract,
        activation=activation,
        zero_groups=zero_groups,
        exact_rows=exact_rows,
        width_in=width_in,
        width_out=width_out,
        multiprocessors=device.multiprocessors,
    )

    scratch = dict(
        rows_smem=plgpu.SMEM(
            (tiles.stages, tiles.rows, tiles.depth), dtype, transforms=swizzled(dtype, swizzle_bytes=operand_swizzle)
        ),
        weights_smem=plgpu.SMEM(
            (tiles.stages, column_parts, *weights_step),
            dtype,
            transforms=swizzled(dtype, swizzle_bytes=operand_swizzle),
        ),
        result_smem=plgpu.SMEM(
            (WARPGROUPS, 2, WARPGROUP_ROWS, result_swizzle // output_dtype.itemsize),
            output_dtype,
            transforms=swizzled(output_dtype, 1 if exact_rows else ROW_ALIGNMENT, result_swizzle),
        ),
        filled=plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
        consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
    )
    if bias is not None:
        scratch["bias_smem"] = plgpu.SMEM((WARPGROUPS, projections, part_columns), bias.dtype)
        scratch["bias_filled"] = plgpu.Barrier(num_arrivals=projections, num_barriers=WARPGROUPS)

    def grouped_rows(*refs: Ref, **scratch: Ref) -> None:
        named = dict(zip((*operands, *outputs), refs, strict=True))
        copying = lax.axis_index("warpgroup") == WARPGROUPS
        lax.cond(copying, lambda: _copy(problem, **named, **scratch), lambda: _multiply(problem, **named, **scratch))

    results = plgpu.kernel(
        grouped_rows,
        out_type=tuple(outputs.values()),
        grid=(device.multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=OWN_BARRIERS,
    )(*operands.values())
    return tuple(results) if keep_projected else results[0]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is static in the body of the kernel."""

    tiles: RowTiles
    projections: int
    contract: Literal["in", "out"]
    activation: Activation | None
    zero_groups: bool
    exact_rows: bool
    width_in: int
    width_out: int
    multiprocessors: int

    @property
    def steps(self) -> int:
        """Of the pipeline, for one tile."""
        return pl.cdiv(self.width_in, self.tiles.depth)


class _Tile(NamedTuple):
    """One output tile."""

    column: Array
    """Index of its columns."""
    group: Array
    row: Array
    first: Array
    last: Array

    def steps(self, problem: _Problem) -> int | Array:
        """Steps of the pipeline: none if the tile is only to be zero."""
        return jnp.where(self.group < 0, 0, problem.steps) if problem.zero_groups else problem.steps


def _for_own_tiles(problem: _Problem, named: dict[str, Ref], visit: Callable[[_Tile, Array], Array]) -> Array:
    """Call `visit(tile, step)` for each tile of this block, every `multiprocessors`-th of all.

    `step` counts the steps of the pipeline, which `visit` advances; returns it at last. A tile's entry is read from memory
    while the tile before it is computed.
    """
    block, num_columns = lax.axis_index("multiprocessor"), pl.cdiv(problem.width_out, problem.tiles.columns)
    count = num_tiles(named["ends"])
    own = lax.div(count * num_columns - block + problem.multiprocessors - 1, problem.multiprocessors)

    def entry(index: Array) -> _Tile:
        return _tile(problem, block + jnp.minimum(index, own - 1) * problem.multiprocessors, count, named)

    def visit_and_read_ahead(index: Array, carry: tuple[Array, _Tile]) -> tuple[Array, _Tile]:
        step, tile = carry
        ahead = entry(index + 1)
        return visit(tile, step), ahead

    return lax.fori_loop(0, own, visit_and_read_ahead, (jnp.int32(0), entry(jnp.int32(0))))[0]


def _tile(problem: _Problem, position: Array, count: Array, named: dict[str, Ref]) -> _Tile:
    """The tile at a position: panels of rows one after the other, column by column within a panel.

    Blocks work on neighbouring positions at any time; within a panel these share the weights of a column or the rows of a
    tile. Any position will do for a table without tiles.
    """
    panel, num_columns = problem.tiles.panel, pl.cdiv(problem.width_out, problem.tiles.columns)
    position = jnp.maximum(position, 0)
    which = lax.div(position, panel * num_columns)
    within = position - which * (panel * num_columns)
    height = jnp.clip(count - which * panel, 1, panel)
    column = lax.div(within, height)
    entry = which * panel + within - column * height
    entry = jnp.where(count > 0, entry, 0)
    return _Tile(column, *(named[name][entry] for name in ("group", "row", "first", "last")))


def _copy(problem: _Problem, *, rows_smem, weights_smem, filled, consumed, **named) -> None:
    """Copy rows and weights, step by step of tile by tile, as far ahead as there is room."""
    plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
    tiles, projections = problem.tiles, problem.projections
    column_parts = column_parts_of(tiles)
    part_columns = tiles.columns // column_parts
    rows, weights = named["rows"], named["weights"]
    first_matrix = named["first_matrix"][0]

    def copy_tile(tile: _Tile, step: Array) -> Array:
        row = pl.multiple_of(tile.row, ROW_ALIGNMENT)
        matrix = first_matrix + tile.group

        def copy_step(k: Array, step: Array) -> Array:
            slot = lax.rem(step, tiles.stages)

            @pl.when(step >= tiles.stages)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            depth = pl.ds(k * tiles.depth, tiles.depth)
            plgpu.copy_gmem_to_smem(rows.at[pl.ds(row, tiles.rows), depth], rows_smem.at[slot], filled.at[slot])
            for part in range(column_parts):
                columns = pl.ds(tile.column * tiles.columns + part * part_columns, part_columns)
                if problem.contract == "out":
                    source = weights.at[matrix, depth, columns]
                    plgpu.copy_gmem_to_smem(source, weights_smem.at[slot, part], filled.at[slot])
                    continue
                for projection in range(projections):
                    source = weights.at[matrix * projections + projection, columns, depth]
                    beside = pl.ds(projection * part_columns, part_columns)
                    plgpu.copy_gmem_to_smem(source, weights_smem.at[slot, part, beside], filled.at[slot])
            return step + 1

        return lax.fori_loop(0, tile.steps(problem), copy_step, step)

    step = _for_own_tiles(problem, named, copy_tile)

    @pl.loop(jnp.maximum(step - tiles.stages, 0), step)
    def _(last_step):
        plgpu.barrier_wait(consumed.at[lax.rem(last_step, tiles.stages)])


def _multiply(problem: _Problem, *, rows_smem, weights_smem, filled, consumed, **named) -> None:
    """Multiply what has been copied, and store the results, tile by tile."""
    plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
    tiles, projections = problem.tiles, problem.projections
    column_parts = column_parts_of(tiles)
    part_columns = tiles.columns // column_parts
    warpgroup = lax.axis_index("warpgroup")
    row_part, column_part = (warpgroup, 0) if column_parts == 1 else (0, warpgroup)
    row_offset = row_part * WARPGROUP_ROWS
    own_rows = pl.ds(row_offset, WARPGROUP_ROWS)

    def multiply_tile(tile: _Tile, step: Array) -> Array:
        steps = tile.steps(problem)
        first, last = tile.first - row_offset, tile.last - row_offset
        column = tile.column * tiles.columns + column_part * part_columns

        def pass_over() -> None:
            @pl.loop(step, step + steps)
            def _(passed):
                slot = lax.rem(passed, tiles.stages)
                plgpu.barrier_wait(filled.at[slot])
                plgpu.barrier_arrive(consumed.at[slot])

        def compute() -> None:
            # What the end of the tile needs is on its way while the products are computed.
            scale = _row_scale(tile, row_offset, named)
            _copy_bias(problem, tile, warpgroup, column, named)

            def accumulate(accumulator: Ref) -> Array:
                @pl.loop(step, step + steps)
                def _(current):
                    slot = lax.rem(current, tiles.stages)
                    plgpu.barrier_wait(filled.at[slot])
                    matrix = weights_smem.at[slot, column_part]
                    if problem.contract == "in":
                        matrix = matrix.transpose((1, 0))
                    plgpu.wgmma(accumulator, rows_smem.at[slot, own_rows], matrix)
                    # The product of this step runs on; that of the last one is complete, and its operands may go.
                    plgpu.wgmma_wait(1)

                    @pl.when(current > step)
                    def _():
                        plgpu.barrier_arrive(consumed.at[lax.rem(current - 1, tiles.stages)])

                plgpu.wgmma_wait(0)

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_arrive(consumed.at[lax.rem(step + steps - 1, tiles.stages)])

                return accumulator[...]

            accumulated = pl.run_scoped(
                accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, projections * part_columns))
            )
            _finish(problem, accumulated, scale, tile, warpgroup, row_offset, column, named)

        if column_parts == 1:
            lax.cond(jnp.logical_and(first < WARPGROUP_ROWS, last > 0), compute, pass_over)
        else:
            compute()
        return step + steps

    _for_own_tiles(problem, named, multiply_tile)
    plgpu.wait_smem_to_gmem(0)


def _row_scale(tile: _Tile, row_offset: Array | int, named: dict[str, Ref]) -> Float[Array, "rows"] | None:
    """The factors of a warpgroup's rows."""
    if "row_scale" not in named:
        return None
    row = pl.multiple_of(tile.row + row_offset, ROW_ALIGNMENT)
    return load_vector(named["row_scale"].at[pl.ds(row, WARPGROUP_ROWS)])


def _copy_bias(problem: _Problem, tile: _Tile, warpgroup: Array, column: Array, named: dict[str, Ref]) -> None:
    """Start copying the bias of a warpgroup's columns. All of it has been read before the last results were stored."""
    if "bias" not in named:
        return
    columns = pl.ds(column, named["bias_smem"].shape[-1])
    for projection in range(problem.projections):
        source = named["bias"].at[_bias_group(problem, tile) * problem.projections + projection, columns]
        destination = named["bias_smem"].at[warpgroup, projection]
        plgpu.copy_gmem_to_smem(source, destination, named["bias_filled"].at[warpgroup])


def _bias_group(problem: _Problem, tile: _Tile) -> Array:
    """The group of a tile; any for one that is to be zero."""
    return jnp.maximum(tile.group, 0) if problem.zero_groups else tile.group


def _finish(
    problem: _Problem,
    accumulated: Array,
    scale: Float[Array, "rows"] | None,
    tile: _Tile,
    warpgroup: Array,
    row_offset: Array | int,
    column: Array,
    named: dict[str, Ref],
) -> None:
    """Bias, activation and scale of a warpgroup's accumulator, then the stores, one chunk of columns after the other."""
    projections = problem.projections
    part_columns = accumulated.shape[1] // projections
    buffers = named["result_smem"].at[warpgroup]
    num_slots, _, chunk = buffers.shape
    stored = 0
    if "bias" in named:
        plgpu.barrier_wait(named["bias_filled"].at[warpgroup])

    def store(values: Array, destination: Ref, first_column: Array) -> None:
        nonlocal stored
        buffer = buffers.at[stored % num_slots]
        # A tile begins with the first buffer, whichever the tile before it ended with.
        plgpu.wait_smem_to_gmem(num_slots - 1 if stored else 0, wait_read_only=True)
        stored += 1
        buffer[...] = values.astype(buffer.dtype)
        plgpu.commit_smem()
        store_rows(
            buffer,
            destination,
            row=pl.multiple_of(tile.row + row_offset, ROW_ALIGNMENT),
            first=tile.first - row_offset,
            last=tile.last - row_offset,
            column=first_column,
            exact_rows=problem.exact_rows,
        )
        plgpu.commit_smem_to_gmem_group()

    for start in range(0, part_columns, chunk):
        projected = []
        for projection in range(projections):
            begin = projection * part_columns + start
            values = accumulated[:, begin : begin + chunk]
            if "bias" in named:
                bias = load_vector(named["bias_smem"].at[warpgroup, projection, pl.ds(start, chunk)]).astype(
                    jnp.float32
                )
                if problem.zero_groups:
                    bias = bias * (tile.group >= 0).astype(jnp.float32)
                values = values + bias[None, :]
            projected.append(values)
            if "projected" in named:
                store(values, named["projected"].at[:, projection], column + start)
        values = activate(problem.activation, projected)
        if scale is not None:
            values = values * scale[:, None]
        store(values, named["result"], column + start)
