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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Float

from ..device import GpuDevice
from ..groups import Groups
from .blackwell_memory import ACCUMULATORS, EPILOGUE_VALUES, RESULT_BUFFERS, SWIZZLE_BYTES
from .blackwell_weights_gradient_tiles import DEPTH_MULTIPLE, check_blackwell_weights_gradient_tiles
from .padding import pad_to_multiples
from .ref import Ref
from .schedule import ROW_ALIGNMENT
from .stores import swizzled
from .tiles import WeightsGradientTiles

_STORING, _MULTIPLYING, _MASKING = 0, 1, 2  # warpgroups
_COPY_WARP, _MULTIPLY_WARP = 0, 1  # warps of the multiplying warpgroup


def weights_gradient(
    cotangent: Float[Array, "M N"],
    rows: Float[Array, "M D"],
    groups: Groups,
    *,
    tiles: WeightsGradientTiles,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Float[Array, "G N D"]:
    """`cotangent[r].T @ rows[r]` over the rows r of each group, accumulated in float32 and rounded once; zero for an empty group.

    Rows outside the groups are never used, whatever they hold, NaN included.

    Args:
        cotangent: gradient with respect to the product, bfloat16 or float16, N a multiple of 8.
        rows: the rows that were multiplied, of the same dtype, D a multiple of 8.
        groups: where the groups lie; they may start at any row, and have any size.
        tiles: tile sizes, legal by `check_blackwell_weights_gradient_tiles`.
        output_dtype: bfloat16, float16 or float32.
        device: what the kernel runs on.

    Raises:
        ValueError: tiles that don't fit.
    """
    check_blackwell_weights_gradient_tiles(tiles, rows.dtype.itemsize, device)
    dtype, output_dtype = rows.dtype, jnp.dtype(output_dtype)
    width_out, width_in = cotangent.shape[1], rows.shape[1]
    num_groups = groups.sizes.shape[0]
    if rows.shape[0] == 0 or num_groups == 0:
        return jnp.zeros((num_groups, width_out, width_in), output_dtype)
    # Swizzled copies address whole rows of 128 bytes, 8 at a time. Nothing is padded at widths of models.
    whole = SWIZZLE_BYTES // dtype.itemsize
    cotangent, rows = (pad_to_multiples(operand, ROW_ALIGNMENT, whole) for operand in (cotangent, rows))
    padded_out, padded_in = cotangent.shape[1], rows.shape[1]
    problem = _Problem(
        tiles=tiles,
        num_groups=num_groups,
        num_out=pl.cdiv(padded_out, tiles.out_columns),
        num_in=pl.cdiv(padded_in, tiles.in_columns),
        multiprocessors=device.multiprocessors,
    )
    chunk = min(EPILOGUE_VALUES, SWIZZLE_BYTES // output_dtype.itemsize)
    names = ("starts", "sizes", "cotangent", "rows", "gradient")

    def grouped_gradient(*refs: Ref, **scratch: Ref) -> None:
        named = dict(zip(names, refs, strict=True)) | scratch

        @pl.when(lax.axis_index("warpgroup") == _MULTIPLYING)
        def _():
            @plgpu.warp_map
            def _(warp):
                pl.when(warp == _COPY_WARP)(lambda: _copy(problem, named))
                pl.when(warp == _MULTIPLY_WARP)(lambda: _multiply(problem, named))

        pl.when(lax.axis_index("warpgroup") == _MASKING)(lambda: _mask(problem, named))
        pl.when(lax.axis_index("warpgroup") == _STORING)(lambda: _store(problem, named))

    gradient = plgpu.kernel(
        grouped_gradient,
        out_type=jax.ShapeDtypeStruct((num_groups, padded_out, padded_in), output_dtype),
        grid=(device.multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=dict(
            cotangent_smem=plgpu.SMEM(
                (tiles.stages, tiles.depth, tiles.out_columns), dtype, transforms=swizzled(dtype)
            ),
            rows_smem=plgpu.SMEM((tiles.stages, tiles.depth, tiles.in_columns), dtype, transforms=swizzled(dtype)),
            result_smem=plgpu.SMEM(
                (RESULT_BUFFERS, tiles.out_columns, chunk),
                output_dtype,
                transforms=swizzled(output_dtype, swizzle_bytes=chunk * output_dtype.itemsize),
            ),
            accumulators=plgpu.TMEM((tiles.out_columns, ACCUMULATORS * tiles.in_columns), jnp.float32),
            copied=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            masked=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.stages),
            consumed=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.stages, orders_tensor_core=True),
            multiplied=plgpu.Barrier(num_arrivals=1, num_barriers=ACCUMULATORS, orders_tensor_core=True),
            taken=plgpu.Barrier(num_arrivals=1, num_barriers=ACCUMULATORS, orders_tensor_core=True),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(groups.starts.astype(jnp.int32), groups.sizes.astype(jnp.int32), cotangent, rows)
    return gradient[:, :width_out, :width_in]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is static in the body of the kernel."""

    tiles: WeightsGradientTiles
    num_groups: int
    num_out: int
    """Tiles along the columns of the cotangent."""
    num_in: int
    """Tiles along the columns of the rows."""
    multiprocessors: int


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
    """The block's tile in its turn: group by group, panels of its rows one after the other, column by column within a panel."""
    tiles, num_out, num_in = problem.tiles, problem.num_out, problem.num_in
    index = lax.axis_index("multiprocessor") + turn * problem.multiprocessors
    group = lax.div(index, num_out * num_in)
    index -= group * (num_out * num_in)
    panel = lax.div(index, tiles.panel * num_in)
    index -= panel * (tiles.panel * num_in)
    height = jnp.minimum(num_out - panel * tiles.panel, tiles.panel)
    column = lax.div(index, height)
    out = panel * tiles.panel + index - column * height

    start, size = named["starts"][group], named["sizes"][group]
    # A product, because code of a single warp cannot state what a number is a multiple of.
    row = lax.div(start, ROW_ALIGNMENT) * ROW_ALIGNMENT
    first = start - row
    last = jnp.where(size > 0, first + size, 0)
    steps = lax.div(last + (tiles.depth - 1), tiles.depth)
    return _Tile(group, out * tiles.out_columns, column * tiles.in_columns, row, first, last, steps)


def _for_each_tile(problem: _Problem, named: dict[str, Ref], visit: Callable[[_Tile, _Done], None]) -> _Done:
    """Call `visit` for the tiles of this block, in order: every `multiprocessors`-th of all."""
    total = problem.num_groups * problem.num_out * problem.num_in
    num_tiles = lax.div(total - lax.axis_index("multiprocessor") + problem.multiprocessors - 1, problem.multiprocessors)

    def one_tile(turn: Array, done: _Done) -> _Done:
        tile = _tile(problem, turn, named)
        visit(tile, done)
        return _Done(done.steps + tile.steps, done.multiplied + jnp.where(tile.steps > 0, 1, 0))

    return lax.fori_loop(0, num_tiles, one_tile, _Done(jnp.int32(0), jnp.int32(0)))


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

    total = _for_each_tile(problem, named, copy_tile).steps

    # The tensor core reports to these barriers on its own, so they must outlive its last report.
    @pl.loop(jnp.maximum(total - tiles.stages, 0), total)
    def _(step):
        plgpu.barrier_wait(named["consumed"].at[lax.rem(step, tiles.stages)])


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
        accumulator, which = _accumulator(problem, named, done)

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

    total = _for_each_tile(problem, named, multiply_tile).multiplied

    @pl.loop(jnp.maximum(total - ACCUMULATORS, 0), total)
    def _(multiplied):
        plgpu.barrier_wait(named["taken"].at[lax.rem(multiplied, ACCUMULATORS)])


def _accumulator(problem: _Problem, named: dict[str, Ref], done: _Done) -> tuple[Ref, Array]:
    """The accumulator of a tile, and its index: they take turns."""
    which = lax.rem(done.multiplied, ACCUMULATORS)
    columns = problem.tiles.in_columns
    return named["accumulators"].at[:, pl.ds(which * columns, columns)], which


def _store(problem: _Problem, named: dict[str, Ref]) -> None:
    """Store each complete accumulator, one chunk of columns after the other; zeros for empty groups."""
    tiles = problem.tiles
    num_buffers, _, chunk = named["result_smem"].shape
    num_chunks = tiles.in_columns // chunk

    def store_chunks(tile: _Tile, compute: Callable[[Array], Array]) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before may have left through any buffer last

        @pl.loop(0, num_chunks)
        def _(index):
            values = compute(index)
            buffer = named["result_smem"].at[lax.rem(index, num_buffers)]
            plgpu.wait_smem_to_gmem(num_buffers - 1, wait_read_only=True)
            buffer[...] = values.astype(buffer.dtype)
            plgpu.commit_smem()
            part = pl.ds(tile.out_column, tiles.out_columns), pl.ds(tile.in_column + index * chunk, chunk)
            plgpu.copy_smem_to_gmem(buffer, named["gradient"].at[tile.group, *part])

    def store_tile(tile: _Tile, done: _Done) -> None:
        accumulator, which = _accumulator(problem, named, done)

        def product(index: Array) -> Array:
            source = accumulator.at[:, pl.ds(index * chunk, chunk)]
            values = plgpu.async_load_tmem(source, layout=plgpu.Layout.TCGEN05)

            @pl.when(index == num_chunks - 1)
            def _():
                plgpu.wait_load_tmem()
                plgpu.barrier_arrive(named["taken"].at[which])

            return values

        @pl.when(tile.steps > 0)
        def _():
            plgpu.barrier_wait(named["multiplied"].at[which])
            store_chunks(tile, product)

        @pl.when(tile.steps == 0)
        def _():
            zeros = plgpu.layout_cast(jnp.zeros((tiles.out_columns, chunk), jnp.float32), plgpu.Layout.TCGEN05)
            store_chunks(tile, lambda _: zeros)

    _for_each_tile(problem, named, store_tile)
    plgpu.wait_smem_to_gmem(0)
