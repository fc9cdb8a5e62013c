"""Rows times the matrix of their group, on Blackwell: the kernel for any number of rows per group.

One block per multiprocessor walks over output tiles. Its parts meet only at barriers, and each runs ahead as far as memory
allows:

- one warp copies steps of rows and weights into a ring in shared memory, without a pause between tiles;
- one warp multiplies them (tcgen05), gate and up side by side by one instruction, into one of two accumulators in tensor memory;
- one warpgroup takes a complete accumulator through bias, activation and scale to global memory, while the next tile is
  multiplied into the other accumulator.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .barriers import wait_for_last_uses
from .blackwell_block import (
    STORING,
    accumulator_of,
    accumulator_scratch,
    run_in_two_warps,
    run_in_warpgroup,
    take_chunk,
    wait_until_all_are_taken,
)
from .blackwell_memory import ACCUMULATORS, EPILOGUE_VALUES, RESULT_BUFFERS, SWIZZLE_BYTES
from .blackwell_row_tiles import check_blackwell_row_tiles
from .epilogue import activate, load_vector
from .kernel_call import call_kernel
from .padding import pad_to_multiples
from .ref import Ref
from .rows_problem import RowsProblem, Tile
from .schedule import ROW_ALIGNMENT, num_tiles
from .stores import store_rows, swizzled
from .tile_order import num_own, own_position, place_in_panels


def call(problem: RowsProblem, operands: dict[str, Array]) -> dict[str, Array]:
    """The outputs of a problem by name; see `rows_product.multiply_rows`.

    Args:
        problem: what is static.
        operands: the arrays of a `TileTable`, "rows", "weights", and where there are, "bias" and "row_scale", which has as many
            factors more as a tile has rows.

    Raises:
        ValueError: tiles that don't fit.
    """
    check_blackwell_row_tiles(problem.tiles, problem.projections, operands["rows"].dtype.itemsize, problem.device)
    num_rows, width_out = operands["rows"].shape[0], problem.width_out
    problem, operands = _padded(problem, operands)

    def grouped_rows(named: dict[str, Ref]) -> None:
        run_in_two_warps(lambda: _copy(problem, named), lambda: _multiply(problem, named))
        run_in_warpgroup(STORING, lambda: _store(problem, named))

    results = call_kernel(
        grouped_rows,
        operands=operands,
        outputs=problem.outputs(operands["rows"].shape[0]),
        scratch=_scratch(problem, operands["rows"].dtype),
        num_blocks=problem.num_blocks,
        num_warpgroups=2,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )
    return {name: result[:num_rows, ..., :width_out] for name, result in results.items()}


def _padded(problem: RowsProblem, operands: dict[str, Array]) -> tuple[RowsProblem, dict[str, Array]]:
    """The problem with the sizes that swizzled copies address: 8 rows, and whole rows of 128 bytes. Models have such widths."""
    whole = SWIZZLE_BYTES // operands["rows"].dtype.itemsize
    rows = pad_to_multiples(operands["rows"], ROW_ALIGNMENT, whole)
    weights = pad_to_multiples(operands["weights"], 1, whole, whole)
    operands = operands | {"rows": rows, "weights": weights}
    if "bias" in operands:
        # What is read without a bulk copy must exist for the last, partial tile too.
        columns = math.lcm(whole, problem.tiles.columns)
        operands["bias"] = pad_to_multiples(operands["bias"].astype(jnp.float32), 1, columns)
    width_out = weights.shape[1 if problem.contract == "in" else 2]
    return dataclasses.replace(problem, width_in=rows.shape[1], width_out=width_out), operands


def _scratch(problem: RowsProblem, dtype: jnp.dtype) -> dict[str, Any]:
    """Types of a block's own memory and barriers, by name, for operands of a dtype."""
    tiles, output_dtype = problem.tiles, problem.output_dtype
    width = _accumulator_columns(problem)
    weights_step = (width, tiles.depth) if problem.contract == "in" else (tiles.depth, width)
    chunk = SWIZZLE_BYTES // output_dtype.itemsize
    if not problem.exact_rows:  # single rows can only leave from multiples of 128 bytes, so each is as wide
        chunk = min(chunk, EPILOGUE_VALUES // problem.projections)
    result_rows = 1 if problem.exact_rows else ROW_ALIGNMENT
    return dict(
        rows_smem=plgpu.SMEM((tiles.stages, tiles.rows, tiles.depth), dtype, transforms=swizzled(dtype)),
        weights_smem=plgpu.SMEM((tiles.stages, *weights_step), dtype, transforms=swizzled(dtype)),
        result_smem=plgpu.SMEM(
            (RESULT_BUFFERS, tiles.rows, chunk),
            output_dtype,
            transforms=swizzled(output_dtype, result_rows, chunk * output_dtype.itemsize),
        ),
        filled=plgpu.Barrier(num_arrivals=1 + problem.projections, num_barriers=tiles.stages),
        consumed=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.stages, orders_tensor_core=True),
        **accumulator_scratch(tiles.rows, width),
    )


def _accumulator_columns(problem: RowsProblem) -> int:
    """Of one accumulator: gate and up side by side."""
    return problem.projections * problem.tiles.columns


def _tile(problem: RowsProblem, turn: Array, named: dict[str, Ref]) -> Tile:
    """The block's tile in its turn."""
    panel = problem.tiles.panel
    entry, column = place_in_panels(
        own_position(turn, problem.num_blocks),
        panel,
        problem.num_columns,
        lambda which: jnp.minimum(num_tiles(named["ends"]) - which * panel, panel),
    )
    return Tile.of(named, entry, column)


def _for_each_multiplied_tile(
    problem: RowsProblem,
    named: dict[str, Ref],
    visit: Callable[[Tile, Array], None],
    pass_zeros: Callable[[Tile], None] | None = None,
) -> Array:
    """Call `visit(tile, multiplied)` for the tiles of this block that are multiplied, in order, and count them.

    `multiplied` is how many were before; every part of the block finds its slots of barriers and memory by it.
    `pass_zeros(tile)` is called for the tiles that are only to be zero.
    """

    def one_tile(index: Array, multiplied: Array) -> Array:
        tile = _tile(problem, index, named)
        if not problem.zero_groups:
            visit(tile, multiplied)
            return multiplied + 1
        pl.when(tile.group >= 0)(lambda: visit(tile, multiplied))
        if (store_zeros := pass_zeros) is not None:
            pl.when(tile.group < 0)(lambda: store_zeros(tile))
        return multiplied + jnp.where(tile.group >= 0, 1, 0)

    own = num_own(num_tiles(named["ends"]) * problem.num_columns, problem.num_blocks)
    return lax.fori_loop(0, own, one_tile, jnp.int32(0))


def _copy(problem: RowsProblem, named: dict[str, Ref]) -> None:
    """Copy rows and weights, step by step of tile by tile, as far ahead as there is room."""
    tiles, projections, steps = problem.tiles, problem.projections, problem.steps
    rows, weights = named["rows"], named["weights"]
    rows_smem, weights_smem, filled, consumed = (
        named[name] for name in ("rows_smem", "weights_smem", "filled", "consumed")
    )
    first_matrix = named["first_matrix"][0]

    def copy_tile(tile: Tile, multiplied: Array) -> None:
        # A product, because code of a single warp cannot state what a number is a multiple of.
        row = lax.div(tile.row, ROW_ALIGNMENT) * ROW_ALIGNMENT
        columns = pl.ds(tile.column * tiles.columns, tiles.columns)
        matrix = first_matrix + tile.group

        @pl.loop(0, steps)
        def _(k):
            step = multiplied * steps + k
            slot = lax.rem(step, tiles.stages)

            @pl.when(step >= tiles.stages)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            depth = pl.ds(k * tiles.depth, tiles.depth)
            plgpu.copy_gmem_to_smem(rows.at[pl.ds(row, tiles.rows), depth], rows_smem.at[slot], filled.at[slot])
            if problem.contract == "out":
                plgpu.copy_gmem_to_smem(weights.at[matrix, depth, columns], weights_smem.at[slot], filled.at[slot])
                return
            for projection in range(projections):
                source = weights.at[matrix * projections + projection, columns, depth]
                beside = pl.ds(projection * tiles.columns, tiles.columns)
                plgpu.copy_gmem_to_smem(source, weights_smem.at[slot, beside], filled.at[slot])

    wait_for_last_uses(consumed, _for_each_multiplied_tile(problem, named, copy_tile) * steps, tiles.stages)


def _multiply(problem: RowsProblem, named: dict[str, Ref]) -> None:
    """Multiply what has been copied, each tile into the accumulator that is free."""
    tiles, steps = problem.tiles, problem.steps
    rows_smem, weights_smem, filled, consumed, multiplied_barrier, taken = (
        named[name] for name in ("rows_smem", "weights_smem", "filled", "consumed", "multiplied", "taken")
    )

    def multiply_tile(tile: Tile, multiplied: Array) -> None:  # noqa: ARG001 - the copies know where the tile is
        accumulator, which = accumulator_of(multiplied, _accumulator_columns(problem), named)

        @pl.when(multiplied >= ACCUMULATORS)
        def _():
            plgpu.barrier_wait(taken.at[which])

        @pl.loop(0, steps)
        def _(k):
            slot = lax.rem(multiplied * steps + k, tiles.stages)
            plgpu.barrier_wait(filled.at[slot])
            matrix = weights_smem.at[slot]
            if problem.contract == "in":
                matrix = matrix.transpose((1, 0))
            plgpu.tcgen05_mma(accumulator, rows_smem.at[slot], matrix, consumed.at[slot], accumulate=k > 0)

        plgpu.tcgen05_commit_arrive(multiplied_barrier.at[which])

    wait_until_all_are_taken(_for_each_multiplied_tile(problem, named, multiply_tile), named)


def _store(problem: RowsProblem, named: dict[str, Ref]) -> None:
    """Bias, activation and scale of each complete accumulator, then the stores; zeros for tiles that are only to be zero."""
    tiles, projections = problem.tiles, problem.projections
    chunk = named["result_smem"].shape[-1]

    def store_tile(tile: Tile, multiplied: Array) -> None:
        accumulator, which = accumulator_of(multiplied, _accumulator_columns(problem), named)
        scale = None
        if "row_scale" in named:
            row = pl.multiple_of(tile.row, ROW_ALIGNMENT)
            scale = load_vector(named["row_scale"].at[pl.ds(row, tiles.rows)])

        def compute(index: Array, column: Array) -> tuple[list[Array], Array]:
            projected = take_chunk(accumulator, projections, index, chunk, named["taken"].at[which])
            if "bias" in named:
                for projection in range(projections):
                    source = named["bias"].at[tile.group * projections + projection, pl.ds(column, chunk)]
                    projected[projection] += load_vector(source)[None, :]
            result = activate(problem.activation, projected)
            return projected, result if scale is None else result * scale[:, None]

        plgpu.barrier_wait(named["multiplied"].at[which])
        _store_chunks(problem, tile, compute, named)

    def store_zeros(tile: Tile) -> None:
        zeros = plgpu.layout_cast(jnp.zeros((tiles.rows, chunk), jnp.float32), plgpu.Layout.TCGEN05)
        _store_chunks(problem, tile, lambda *_: ([zeros] * projections, zeros), named)

    _for_each_multiplied_tile(problem, named, store_tile, store_zeros)
    plgpu.wait_smem_to_gmem(0)


def _store_chunks(
    problem: RowsProblem,
    tile: Tile,
    compute: Callable[[Array, Array], tuple[list[Array], Array]],
    named: dict[str, Ref],
) -> None:
    """Store a tile, one chunk of columns after the other.

    `compute(index, column)` returns the chunk with that index and first column: what enters the activation, and the result.
    """
    num_buffers, _, chunk = named["result_smem"].shape
    num_destinations = 1 + (problem.projections if "projected" in named else 0)
    row = pl.multiple_of(tile.row, ROW_ALIGNMENT)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before may have left through any buffer last

    @pl.loop(0, problem.tiles.columns // chunk)
    def _(index):
        column = tile.column * problem.tiles.columns + index * chunk
        projected, result = compute(index, column)
        stores = [(result, named["result"])]
        if "projected" in named:
            stores = [(projected[p], named["projected"].at[:, p]) for p in range(problem.projections)] + stores
        for place, (values, destination) in enumerate(stores):
            buffer = named["result_smem"].at[lax.rem(index * num_destinations + place, num_buffers)]
            plgpu.wait_smem_to_gmem(num_buffers - 1, wait_read_only=True)
            buffer[...] = values.astype(buffer.dtype)
            plgpu.commit_smem()
            store_rows(
                buffer,
                destination,
                row=row,
                first=tile.first,
                last=tile.last,
                column=column,
                exact_rows=problem.exact_rows,
            )
            plgpu.commit_smem_to_gmem_group()
