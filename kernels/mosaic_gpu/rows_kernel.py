"""Rows times the matrix of their group, on Hopper: the kernel for many rows per group.

One block per multiprocessor walks over output tiles. Its first two warpgroups multiply; the third copies rows and weights to
shared memory, several steps ahead. Steps are counted over all tiles of a block, so the copies for the next tile are under way
while the results of this one are activated and stored.

Gate and up lie side by side in shared memory and are multiplied by one instruction; the activation is applied to its
accumulator, so what enters the activation never reaches memory unless it is asked for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from .barriers import wait_for_last_uses
from .compiler_params import OWN_BARRIERS
from .epilogue import activate, load_vector
from .kernel_call import call_kernel
from .limits import SWIZZLES, swizzle_bytes
from .padding import pad_to_multiples
from .ref import Ref
from .row_tiles import WARPGROUP_ROWS, WARPGROUPS, check_row_tiles, column_parts_of, part_columns_of
from .rows_problem import RowsProblem, Tile
from .schedule import ROW_ALIGNMENT, num_tiles
from .stores import store_rows, swizzled
from .tile_order import BLOCK, num_own, place_in_panels
from .tiles import RowTiles

COPYING_REGISTERS, MULTIPLYING_REGISTERS = 56, 224
"""Per thread; what two warpgroups that multiply leave to one that copies. It spills with 40 for some shapes."""


def call(problem: RowsProblem, operands: dict[str, Array]) -> dict[str, Array]:
    """The outputs of a problem by name; see `rows_product.multiply_rows`.

    Args:
        problem: what is static.
        operands: the arrays of a `TileTable`, "rows", "weights", and where there are, "bias" and "row_scale", which has as many
            factors more as a tile has rows.

    Raises:
        ValueError: tiles that don't fit, or widths that bulk copies cannot address.
    """
    check_row_tiles(problem.tiles, problem.projections, operands["rows"].dtype.itemsize, problem.device)
    scratch = _scratch(problem, operands)
    num_rows = operands["rows"].shape[0]
    # Copies address 8 rows at a time; those added are of no group.
    operands = operands | {"rows": pad_to_multiples(operands["rows"], ROW_ALIGNMENT, 1)}

    def grouped_rows(named: dict[str, Ref]) -> None:
        copying = lax.axis_index("warpgroup") == WARPGROUPS
        lax.cond(copying, lambda: _copy(problem, named), lambda: _multiply(problem, named))

    return call_kernel(
        grouped_rows,
        operands=operands,
        outputs=problem.outputs(num_rows),
        scratch=scratch,
        num_blocks=problem.num_blocks,
        num_warpgroups=WARPGROUPS + 1,
        compiler_params=OWN_BARRIERS,
    )


def _scratch(problem: RowsProblem, operands: dict[str, Array]) -> dict[str, Any]:
    """Types of a block's own memory and barriers, by name."""
    tiles, projections, contract = problem.tiles, problem.projections, problem.contract
    column_parts, part_columns = column_parts_of(tiles), part_columns_of(tiles)
    dtype, output_dtype = operands["rows"].dtype, problem.output_dtype
    weights_step = (projections * part_columns, tiles.depth) if contract == "in" else (tiles.depth, part_columns)
    in_swizzle, out_swizzle = (swizzle_bytes(width, dtype.itemsize) for width in (problem.width_in, problem.width_out))
    # One for both operands, as the instruction wants it; contracting "in", both have rows of width_in.
    operand_layout = swizzled(dtype, swizzle_bytes=in_swizzle if contract == "in" else min(in_swizzle, out_swizzle))
    result_swizzle = swizzle_bytes(problem.width_out, output_dtype.itemsize)
    if problem.exact_rows and result_swizzle < SWIZZLES[0]:
        raise ValueError(
            f"single rows of the result can be stored if they are multiples of {SWIZZLES[0]} bytes, got"
            f" {problem.width_out} columns of {output_dtype}"
        )
    scratch = dict(
        rows_smem=plgpu.SMEM((tiles.stages, tiles.rows, tiles.depth), dtype, transforms=operand_layout),
        weights_smem=plgpu.SMEM((tiles.stages, column_parts, *weights_step), dtype, transforms=operand_layout),
        result_smem=plgpu.SMEM(
            (WARPGROUPS, 2, WARPGROUP_ROWS, result_swizzle // output_dtype.itemsize),
            output_dtype,
            transforms=swizzled(output_dtype, 1 if problem.exact_rows else ROW_ALIGNMENT, result_swizzle),
        ),
        filled=plgpu.Barrier(num_arrivals=1 + column_parts * projections, num_barriers=tiles.stages),
        consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
    )
    if "bias" in operands:
        scratch["bias_smem"] = plgpu.SMEM((WARPGROUPS, projections, part_columns), operands["bias"].dtype)
        scratch["bias_filled"] = plgpu.Barrier(num_arrivals=projections, num_barriers=WARPGROUPS)
    return scratch


def _for_own_tiles(problem: RowsProblem, named: dict[str, Ref], visit: Callable[[Tile, Array], Array]) -> Array:
    """Call `visit(tile, step)` for each tile of this block.

    `step` counts the steps of the pipeline, which `visit` advances; returns it at last. A tile's entry is read from memory
    while the tile before it is computed.
    """
    block, count = lax.axis_index(BLOCK), num_tiles(named["ends"])
    own = num_own(count * problem.num_columns, problem.num_blocks)

    def tile(turn: Array) -> Tile:
        return _tile(problem, block + jnp.minimum(turn, own - 1) * problem.num_blocks, count, named)

    def visit_and_read_ahead(turn: Array, carry: tuple[Array, Tile]) -> tuple[Array, Tile]:
        step, current = carry
        ahead = tile(turn + 1)
        return visit(current, step), ahead

    return lax.fori_loop(0, own, visit_and_read_ahead, (jnp.int32(0), tile(jnp.int32(0))))[0]


def _tile(problem: RowsProblem, position: Array, count: Array, named: dict[str, Ref]) -> Tile:
    """The tile at a position; any position will do for a table without tiles, which is read ahead of, too."""
    panel = problem.tiles.panel
    entry, column = place_in_panels(
        jnp.maximum(position, 0), panel, problem.num_columns, lambda which: jnp.clip(count - which * panel, 1, panel)
    )
    return Tile.of(named, jnp.where(count > 0, entry, 0), column)


def _steps(problem: RowsProblem, tile: Tile) -> int | Array:
    """Steps of the pipeline: none if the tile is only to be zero."""
    return jnp.where(tile.group < 0, 0, problem.steps) if problem.zero_groups else problem.steps


def _copy(problem: RowsProblem, named: dict[str, Ref]) -> None:
    """Copy rows and weights, step by step of tile by tile, as far ahead as there is room."""
    plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
    tiles, filled, consumed = problem.tiles, named["filled"], named["consumed"]
    first_matrix = named["first_matrix"][0]

    def copy_tile(tile: Tile, step: Array) -> Array:
        row = pl.multiple_of(tile.row, ROW_ALIGNMENT)
        matrix = first_matrix + tile.group

        def copy_step(k: Array, step: Array) -> Array:
            slot = lax.rem(step, tiles.stages)

            @pl.when(step >= tiles.stages)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            depth = pl.ds(k * tiles.depth, tiles.depth)
            source = named["rows"].at[pl.ds(row, tiles.rows), depth]
            plgpu.copy_gmem_to_smem(source, named["rows_smem"].at[slot], filled.at[slot])
            _copy_weights(problem, matrix, tile.column * tiles.columns, depth, slot, named)
            return step + 1

        return lax.fori_loop(0, _steps(problem, tile), copy_step, step)

    wait_for_last_uses(consumed, _for_own_tiles(problem, named, copy_tile), tiles.stages)


def _copy_weights(
    problem: RowsProblem, matrix: Array, column: Array, depth: pl.Slice, slot: Array, named: dict[str, Ref]
) -> None:
    """Copy a step of a group's weights, for one part of the columns after the other, gate and up side by side."""
    weights, weights_smem, filled = named["weights"], named["weights_smem"], named["filled"].at[slot]
    part_columns = part_columns_of(problem.tiles)
    for part in range(column_parts_of(problem.tiles)):
        columns = pl.ds(column + part * part_columns, part_columns)
        if problem.contract == "out":
            plgpu.copy_gmem_to_smem(weights.at[matrix, depth, columns], weights_smem.at[slot, part], filled)
            continue
        for projection in range(problem.projections):
            source = weights.at[matrix * problem.projections + projection, columns, depth]
            beside = pl.ds(projection * part_columns, part_columns)
            plgpu.copy_gmem_to_smem(source, weights_smem.at[slot, part, beside], filled)


class _Share(NamedTuple):
    """What of every tile a warpgroup computes."""

    warpgroup: Array
    row: Array | int
    """Its first row in the tile."""
    column_part: Array | int
    """Its part of the columns."""

    @classmethod
    def of(cls, tiles: RowTiles) -> Self:
        """This warpgroup's."""
        warpgroup = lax.axis_index("warpgroup")
        row_part, column_part = (warpgroup, 0) if column_parts_of(tiles) == 1 else (0, warpgroup)
        return cls(warpgroup, row_part * WARPGROUP_ROWS, column_part)

    def first(self, tile: Tile) -> Array:
        """First row of the share that belongs to the tile's group, relative to the share's; may be outside of it."""
        return tile.first - self.row

    def last(self, tile: Tile) -> Array:
        """End of the rows that belong to the tile's group, likewise."""
        return tile.last - self.row


def _multiply(problem: RowsProblem, named: dict[str, Ref]) -> None:
    """Multiply what has been copied, and store the results, tile by tile."""
    plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
    tiles = problem.tiles
    column_parts, part_columns = column_parts_of(tiles), part_columns_of(tiles)
    share = _Share.of(tiles)

    def multiply_tile(tile: Tile, step: Array) -> Array:
        steps = _steps(problem, tile)
        first, last = share.first(tile), share.last(tile)
        column = tile.column * tiles.columns + share.column_part * part_columns

        def compute() -> None:
            # What the end of the tile needs is on its way while the products are computed.
            scale = _row_scale(tile, share, named)
            _copy_bias(problem, tile, share, column, named)
            accumulated = pl.run_scoped(
                lambda accumulator: _accumulate(problem, accumulator, share, step, steps, named),
                plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, problem.projections * part_columns)),
            )
            _finish(problem, accumulated, scale, tile, share, column, named)

        if column_parts == 1:
            has_rows = jnp.logical_and(first < WARPGROUP_ROWS, last > 0)
            lax.cond(has_rows, compute, lambda: _pass_over(problem, step, steps, named))
        else:
            compute()
        return step + steps

    _for_own_tiles(problem, named, multiply_tile)
    plgpu.wait_smem_to_gmem(0)


def _pass_over(problem: RowsProblem, step: Array, steps: int | Array, named: dict[str, Ref]) -> None:
    """Let go of the steps of a tile in which a warpgroup has no rows."""

    @pl.loop(step, step + steps)
    def _(passed):
        slot = lax.rem(passed, problem.tiles.stages)
        plgpu.barrier_wait(named["filled"].at[slot])
        plgpu.barrier_arrive(named["consumed"].at[slot])


def _accumulate(
    problem: RowsProblem, accumulator: Ref, share: _Share, step: Array, steps: int | Array, named: dict[str, Ref]
) -> Float[Array, "rows P*columns"]:
    """The products of a warpgroup's rows and columns, summed over the steps of a tile."""
    stages, consumed = problem.tiles.stages, named["consumed"]
    own_rows = pl.ds(share.row, WARPGROUP_ROWS)

    @pl.loop(step, step + steps)
    def _(current):
        slot = lax.rem(current, stages)
        plgpu.barrier_wait(named["filled"].at[slot])
        matrix = named["weights_smem"].at[slot, share.column_part]
        if problem.contract == "in":
            matrix = matrix.transpose((1, 0))
        plgpu.wgmma(accumulator, named["rows_smem"].at[slot, own_rows], matrix)
        # The product of this step runs on; that of the last one is complete, and its operands may go.
        plgpu.wgmma_wait(1)

        @pl.when(current > step)
        def _():
            plgpu.barrier_arrive(consumed.at[lax.rem(current - 1, stages)])

    plgpu.wgmma_wait(0)

    @pl.when(steps > 0)
    def _():
        plgpu.barrier_arrive(consumed.at[lax.rem(step + steps - 1, stages)])

    return accumulator[...]


def _row_scale(tile: Tile, share: _Share, named: dict[str, Ref]) -> Float[Array, "rows"] | None:
    """The factors of a warpgroup's rows."""
    if "row_scale" not in named:
        return None
    row = pl.multiple_of(tile.row + share.row, ROW_ALIGNMENT)
    return load_vector(named["row_scale"].at[pl.ds(row, WARPGROUP_ROWS)])


def _copy_bias(problem: RowsProblem, tile: Tile, share: _Share, column: Array, named: dict[str, Ref]) -> None:
    """Start copying the bias of a warpgroup's columns. All of it has been read before the last results were stored."""
    if "bias" not in named:
        return
    columns = pl.ds(column, named["bias_smem"].shape[-1])
    for projection in range(problem.projections):
        source = named["bias"].at[_bias_group(problem, tile) * problem.projections + projection, columns]
        destination = named["bias_smem"].at[share.warpgroup, projection]
        plgpu.copy_gmem_to_smem(source, destination, named["bias_filled"].at[share.warpgroup])


def _bias_group(problem: RowsProblem, tile: Tile) -> Array:
    """The group of a tile; any for one that is to be zero."""
    return jnp.maximum(tile.group, 0) if problem.zero_groups else tile.group


def _finish(
    problem: RowsProblem,
    accumulated: Array,
    scale: Float[Array, "rows"] | None,
    tile: Tile,
    share: _Share,
    column: Array,
    named: dict[str, Ref],
) -> None:
    """Bias, activation and scale of a warpgroup's accumulator, then the stores, one chunk of columns after the other."""
    projections = problem.projections
    part_columns = accumulated.shape[1] // projections
    buffers = named["result_smem"].at[share.warpgroup]
    num_slots, _, chunk = buffers.shape
    stored = 0
    if "bias" in named:
        plgpu.barrier_wait(named["bias_filled"].at[share.warpgroup])

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
            row=pl.multiple_of(tile.row + share.row, ROW_ALIGNMENT),
            first=share.first(tile),
            last=share.last(tile),
            column=first_column,
            exact_rows=problem.exact_rows,
        )
        plgpu.commit_smem_to_gmem_group()

    for start in range(0, min(part_columns, problem.width_out), chunk):
        projected = []
        for projection in range(projections):
            begin = projection * part_columns + start
            values = accumulated[:, begin : begin + chunk]
            if "bias" in named:
                bias = load_vector(named["bias_smem"].at[share.warpgroup, projection, pl.ds(start, chunk)]).astype(
                    jnp.float32
                )
                if problem.zero_groups:
                    bias = jnp.where(tile.group >= 0, bias, 0.0)  # that of another group may be infinite
                values = values + bias[None, :]
            projected.append(values)
            if "projected" in named:
                store(values, named["projected"].at[:, projection], column + start)
        values = activate(problem.activation, projected)
        if scale is not None:
            values = values * scale[:, None]
        store(values, named["result"], column + start)
