"""The gradient of a grouped matmul with respect to its weights, on Blackwell: a matmul grouped over its contracted dimension.

One block per multiprocessor walks over the tiles of all groups' gradients, divided into parts that meet only at barriers:

- one warp copies steps of both operands into a ring in shared memory;
- one warpgroup zeroes, in shared memory, the rows of a group's first and last step that belong to its neighbours;
- one warp multiplies (tcgen05) into one of two accumulators in tensor memory;
- one warpgroup stores a complete accumulator, while the next tile is multiplied into the other.

Both operands have the contracted dimension first, as tcgen05 takes 16-bit operands from shared memory either way round.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from ..device import GpuDevice
from ..groups import Groups
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
from .blackwell_weights_gradient_tiles import DEPTH_MULTIPLE, check_blackwell_weights_gradient_tiles
from .kernel_call import call_kernel
from .padding import pad_to_multiples
from .ref import Ref
from .schedule import ROW_ALIGNMENT
from .stores import swizzled
from .tile_order import num_own, own_position, place_in_panels
from .tiles import WeightsGradientTiles

_MASKING = 2  # warpgroup


def call(
    cotangent: Float[Array, "M N"],
    rows: Float[Array, "M D"],
    groups: Groups,
    *,
    tiles: WeightsGradientTiles,
    output_dtype: jnp.dtype,
    device: GpuDevice,
) -> Float[Array, "G N D"]:
    """See `weights_gradient_product.weights_gradient`; there are rows and groups."""
    check_blackwell_weights_gradient_tiles(tiles, rows.dtype.itemsize, device)
    width_out, width_in = cotangent.shape[1], rows.shape[1]
    if tiles.in_columns >= width_in + 64:  # what is beyond a narrow gradient would be stored in it: see `store_rows`
        raise ValueError(f"in_columns must be less than 64 wider than the rows, got {tiles} for {width_in} columns")
    # Swizzled copies address whole rows of 128 bytes, 8 at a time. Nothing is padded at widths of models.
    whole = SWIZZLE_BYTES // rows.dtype.itemsize
    cotangent, rows = (pad_to_multiples(operand, ROW_ALIGNMENT, whole) for operand in (cotangent, rows))
    shape = groups.sizes.shape[0], cotangent.shape[1], rows.shape[1]
    problem = _Problem(
        tiles=tiles,
        num_groups=shape[0],
        num_out=pl.cdiv(shape[1], tiles.out_columns),
        num_in=pl.cdiv(shape[2], tiles.in_columns),
        num_blocks=device.multiprocessors,
    )

    def grouped_gradient(named: dict[str, Ref]) -> None:
        run_in_two_warps(lambda: _copy(problem, named), lambda: _multiply(problem, named))
        run_in_warpgroup(_MASKING, lambda: _mask(problem, named))
        run_in_warpgroup(STORING, lambda: _store(problem, named))

    gradient = call_kernel(
        grouped_gradient,
        operands=dict(
            starts=groups.starts.astype(jnp.int32),
            sizes=groups.sizes.astype(jnp.int32),
            cotangent=cotangent,
            rows=rows,
        ),
        outputs=dict(gradient=jax.ShapeDtypeStruct(shape, output_dtype)),
        scratch=_scratch(tiles, rows.dtype, output_dtype),
        num_blocks=problem.num_blocks,
        num_warpgroups=3,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )["gradient"]
    return gradient[:, :width_out, :width_in]


def _scratch(tiles: WeightsGradientTiles, dtype: jnp.dtype, output_dtype: jnp.dtype) -> dict[str, Any]:
    """Types of a block's own memory and barriers, by name, for operands and a result of these dtypes."""
    chunk = min(EPILOGUE_VALUES, SWIZZLE_BYTES // output_dtype.itemsize)
    return dict(
        cotangent_smem=plgpu.SMEM((tiles.stages, tiles.depth, tiles.out_columns), dtype, transforms=swizzled(dtype)),
        rows_smem=plgpu.SMEM((tiles.stages, tiles.depth, tiles.in_columns), dtype, transforms=swizzled(dtype)),
        result_smem=plgpu.SMEM(
            (RESULT_BUFFERS, tiles.out_columns, chunk),
            output_dtype,
            transforms=swizzled(output_dtype, swizzle_bytes=chunk * output_dtype.itemsize),
        ),
        copied=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        masked=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.stages),
        consumed=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.stages, orders_tensor_core=True),
        **accumulator_scratch(tiles.out_columns, tiles.in_columns),
    )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is static in the body of the kernel."""

    tiles: WeightsGradientTiles
    num_groups: int
    num_out: int
    """Tiles along the columns of the cotangent."""
    num_in: int
    """Tiles along the columns of the rows."""
    num_blocks: int


class _Tile(NamedTuple):
    """One tile of a group's gradient."""

    group: Array
    out_column: Array
    in_column: Array
    row: Array
    """First row that is copied: the multiple of 8 at or before the group's first."""
    first: Array
    """First row that belongs to the group, relative to `row`: 0 to 7."""
    last: Array
    """End of the rows that belong to the group, relative to `row`; zero for an empty group."""
    steps: Array
    """Of the pipeline; none for an empty group."""


class _Done(NamedTuple):
    """What a block did before a tile: every part of the block finds its slots of barriers and memory by it."""

    steps: Array
    multiplied: Array
    """Tiles of groups that are not empty."""


def _tile(problem: _Problem, turn: Array, named: dict[str, Ref]) -> _Tile:
    """The block's tile in its turn: group by group, each in panels of its gradient's rows."""
    tiles, tiles_of_group = problem.tiles, problem.num_out * problem.num_in
    position = own_position(turn, problem.num_blocks)
    group = lax.div(position, tiles_of_group)
    out, column = place_in_panels(
        position - group * tiles_of_group,
        tiles.panel,
        problem.num_in,
        lambda which: jnp.minimum(problem.num_out - which * tiles.panel, tiles.panel),
    )
    start, size = named["starts"][group], named["sizes"][group]
    # A product, because code of a single warp cannot state what a number is a multiple of.
    row = lax.div(start, ROW_ALIGNMENT) * ROW_ALIGNMENT
    first = start - row
    last = jnp.where(size > 0, first + size, 0)
    steps = lax.div(last + (tiles.depth - 1), tiles.depth)
    return _Tile(group, out * tiles.out_columns, column * tiles.in_columns, row, first, last, steps)


def _for_each_tile(problem: _Problem, named: dict[str, Ref], visit: Callable[[_Tile, _Done], None]) -> _Done:
    """Call `visit` for the tiles of this block, in order."""
    own = num_own(problem.num_groups * problem.num_out * problem.num_in, problem.num_blocks)

    def one_tile(turn: Array, done: _Done) -> _Done:
        tile = _tile(problem, turn, named)
        visit(tile, done)
        return _Done(done.steps + tile.steps, done.multiplied + jnp.where(tile.steps > 0, 1, 0))

    return lax.fori_loop(0, own, one_tile, _Done(jnp.int32(0), jnp.int32(0)))


def _copy(problem: _Problem, named: dict[str, Ref]) -> None:
    """Copy both operands, step by step of tile by tile, as far ahead as there is room."""
    tiles = problem.tiles

    def copy_tile(tile: _Tile, done: _Done) -> None:
        @pl.loop(0, tile.steps)
        def _(k):
            step = done.steps + k
            slot = lax.rem(step, tiles.stages)

            @pl.when(step >= tiles.stages)
            def _():
                plgpu.barrier_wait(named["consumed"].at[slot])

            here = pl.ds(tile.row + k * tiles.depth, tiles.depth)
            for name, column, width in (
                ("cotangent", tile.out_column, tiles.out_columns),
                ("rows", tile.in_column, tiles.in_columns),
            ):
                source = named[name].at[here, pl.ds(column, width)]
                plgpu.copy_gmem_to_smem(source, named[f"{name}_smem"].at[slot], named["copied"].at[slot])

    wait_for_last_uses(named["consumed"], _for_each_tile(problem, named, copy_tile).steps, tiles.stages)


def _mask(problem: _Problem, named: dict[str, Ref]) -> None:
    """Zero the rows of a step that are not of its group, in both operands: the other's may be NaN, and NaN * 0 is NaN."""
    tiles = problem.tiles

    def mask_tile(tile: _Tile, done: _Done) -> None:
        @pl.loop(0, tile.steps)
        def _(k):
            slot = lax.rem(done.steps + k, tiles.stages)
            plgpu.barrier_wait(named["copied"].at[slot])
            first_kept, end_kept = tile.first - k * tiles.depth, tile.last - k * tiles.depth

            @pl.when((first_kept > 0) | (end_kept < tiles.depth))
            def _():
                for name in ("cotangent_smem", "rows_smem"):
                    _keep_rows(named[name].at[slot], first_kept, end_kept)
                plgpu.commit_smem()

            plgpu.barrier_arrive(named["masked"].at[slot])

    _for_each_tile(problem, named, mask_tile)


def _keep_rows(operand: Ref, first_kept: Array, end_kept: Array) -> None:
    """Zero all other rows of `operand` [depth, columns] in shared memory."""
    depth, num_columns = operand.shape
    part_columns = SWIZZLE_BYTES // operand.dtype.itemsize
    index = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (DEPTH_MULTIPLE, part_columns), 0), plgpu.Layout.WGMMA)
    for start in range(0, depth, DEPTH_MULTIPLE):
        kept = (index >= first_kept - start) & (index < end_kept - start)

        @pl.loop(0, num_columns // part_columns)
        def _(part, start=start, kept=kept):
            columns = pl.ds(pl.multiple_of(part * part_columns, part_columns), part_columns)
            values = operand.at[pl.ds(start, DEPTH_MULTIPLE), columns]
            values[...] = jnp.where(kept, values[...], jnp.zeros((), operand.dtype))


def _multiply(problem: _Problem, named: dict[str, Ref]) -> None:
    """Multiply what has been copied and masked, each tile into the accumulator that is free."""
    tiles = problem.tiles

    def multiply_tile(tile: _Tile, done: _Done) -> None:
        accumulator, which = accumulator_of(done.multiplied, tiles.in_columns, named)

        @pl.when((tile.steps > 0) & (done.multiplied >= ACCUMULATORS))
        def _():
            plgpu.barrier_wait(named["taken"].at[which])

        @pl.loop(0, tile.steps)
        def _(k):
            slot = lax.rem(done.steps + k, tiles.stages)
            plgpu.barrier_wait(named["masked"].at[slot])
            transposed = named["cotangent_smem"].at[slot].transpose((1, 0))
            operands = transposed, named["rows_smem"].at[slot]
            plgpu.tcgen05_mma(accumulator, *operands, named["consumed"].at[slot], accumulate=k > 0)

        @pl.when(tile.steps > 0)
        def _():
            plgpu.tcgen05_commit_arrive(named["multiplied"].at[which])

    wait_until_all_are_taken(_for_each_tile(problem, named, multiply_tile).multiplied, named)


def _store(problem: _Problem, named: dict[str, Ref]) -> None:
    """Store each complete accumulator; zeros for empty groups."""
    tiles = problem.tiles
    chunk = named["result_smem"].shape[-1]

    def store_tile(tile: _Tile, done: _Done) -> None:
        accumulator, which = accumulator_of(done.multiplied, tiles.in_columns, named)

        def product(index: Array) -> Array:
            return take_chunk(accumulator, 1, index, chunk, named["taken"].at[which])[0]

        @pl.when(tile.steps > 0)
        def _():
            plgpu.barrier_wait(named["multiplied"].at[which])
            _store_chunks(tiles, tile, product, named)

        @pl.when(tile.steps == 0)
        def _():
            zeros = plgpu.layout_cast(jnp.zeros((tiles.out_columns, chunk), jnp.float32), plgpu.Layout.TCGEN05)
            _store_chunks(tiles, tile, lambda _: zeros, named)

    _for_each_tile(problem, named, store_tile)
    plgpu.wait_smem_to_gmem(0)


def _store_chunks(
    tiles: WeightsGradientTiles, tile: _Tile, compute: Callable[[Array], Array], named: dict[str, Ref]
) -> None:
    """Store a tile, one chunk of columns after the other, which `compute` returns for its index."""
    num_buffers, _, chunk = named["result_smem"].shape
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before may have left through any buffer last

    @pl.loop(0, tiles.in_columns // chunk)
    def _(index):
        values = compute(index)
        buffer = named["result_smem"].at[lax.rem(index, num_buffers)]
        plgpu.wait_smem_to_gmem(num_buffers - 1, wait_read_only=True)
        buffer[...] = values.astype(buffer.dtype)
        plgpu.commit_smem()
        part = pl.ds(tile.out_column, tiles.out_columns), pl.ds(tile.in_column + index * chunk, chunk)
        plgpu.copy_smem_to_gmem(buffer, named["gradient"].at[tile.group, *part])
