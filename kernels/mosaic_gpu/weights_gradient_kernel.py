"""The gradient of a grouped matmul with respect to its weights, for Hopper: a matmul grouped over its contracted dimension.

A persistent grid with one block for each multiprocessor works on the tiles of all groups' gradients. In a block one warpgroup
only copies (the producer), and two multiply (the consumers), each a half of the tile's rows. Slots of shared memory go round
by a count of steps over all of the block's tiles, so that the producer fills them for the next tile while the consumers are
still storing this one.

Both operands have the contracted dimension first, as wgmma takes 16-bit operands from shared memory either way round. The first
and the last step of a group may hold rows of its neighbours: the consumers zero those in shared memory, while the step before
is still being multiplied.
"""

import itertools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..device import GpuDevice
from ..groups import Groups
from .limits import LEAST_WIDTH, swizzle_bytes
from .padding import pad_to_multiples
from .schedule import ROW_ALIGNMENT
from .stores import swizzled
from .tiles import WeightsGradientTiles
from .weights_gradient_tiles import CHUNK_ROWS, CONSUMERS, staged_chunks

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


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
        cotangent: Gradient with respect to the product, bfloat16 or float16. N must be a multiple of 16.
        rows: The rows that were multiplied, of the same dtype. D must be a multiple of 16.
        groups: Where the groups lie; they may start at any row, and have any size.
        tiles: Tile sizes; see `default_weights_gradient_tiles`.
        output_dtype: bfloat16, float16 or float32.
        device: The Hopper GPU to build for.

    Raises:
        ValueError: shapes that do not fit each other or cannot be copied; tiles or a device that the kernel does not take.
        TypeError: dtypes other than these.
    """
    output_dtype = jnp.dtype(output_dtype)
    _check_operands(cotangent, rows, output_dtype)
    if device.compute_capability[0] != 9:
        raise ValueError(
            f"this kernel needs compute capability 9.x (Hopper), {device.name} has {device.compute_capability}"
        )
    staged = staged_chunks(tiles, rows.dtype.itemsize, output_dtype.itemsize, device)
    num_rows, width_out = cotangent.shape
    width_in = rows.shape[1]
    num_groups = groups.sizes.shape[0]
    if num_rows == 0 or num_groups == 0:
        return jnp.zeros((num_groups, width_out, width_in), output_dtype)

    # Swizzled copies address 8 rows at a time. The rows that are added belong to no group.
    cotangent, rows = (pad_to_multiples(operand, ROW_ALIGNMENT, 1) for operand in (cotangent, rows))
    depth, stages = tiles.depth, tiles.stages
    tile_grid = _TileGrid.of(num_groups, width_out, width_in, tiles)
    num_blocks = min(device.multiprocessors, tile_grid.num_tiles)
    consumer_rows = tiles.out_columns // CONSUMERS
    # One for both operands, as the instruction wants it.
    operand_swizzle = min(swizzle_bytes(width, rows.dtype.itemsize) for width in (width_out, width_in))
    gradient_swizzle = swizzle_bytes(width_in, output_dtype.itemsize)
    chunk_columns = gradient_swizzle // output_dtype.itemsize
    mask_columns = operand_swizzle // rows.dtype.itemsize

    def grouped_gradient(
        group, row, first, last, cotangent, rows, gradient, out_slots, in_slots, staging, full, empty, masked
    ):
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        num_tiles_here = tile_grid.num_tiles_of_block(block, num_blocks)

        def group_of_tile(turn):
            """The table's entry for the block's tile in its turn; for its last one in later turns."""
            place, _, _ = tile_grid.tile(jnp.minimum(turn, num_tiles_here - 1), block, num_blocks)
            return _GroupTable(group[place], row[place], first[place], last[place])

        def for_own_tiles(visit):
            """Call `visit(entry, out_column, in_column, step)`, which returns the next step; the entry ahead is read meanwhile."""

            def visit_and_read_ahead(turn, carry):
                step, entry = carry
                ahead = group_of_tile(turn + 1)
                _, out_column, in_column = tile_grid.tile(turn, block, num_blocks)
                return visit(entry, out_column, in_column, step), ahead

            # There are no more blocks than tiles, so each has a first one.
            start = (jnp.int32(0), group_of_tile(jnp.int32(0)))
            return lax.fori_loop(0, num_tiles_here, visit_and_read_ahead, start)[0]

        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def copy_tile(entry, out_column, in_column, step):
                def copy_step(k, step):
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    here = pl.ds(pl.multiple_of(entry.row + k * depth, ROW_ALIGNMENT), depth)
                    out_part, in_part = pl.ds(out_column, tiles.out_columns), pl.ds(in_column, tiles.in_columns)
                    plgpu.copy_gmem_to_smem(cotangent.at[here, out_part], out_slots.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(rows.at[here, in_part], in_slots.at[slot], full.at[slot])
                    return step + 1

                return lax.fori_loop(0, _num_steps(entry.last, depth), copy_step, step)

            num_steps = for_own_tiles(copy_tile)

            @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
            def _(step):  # a block must not end before its barriers were last used
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        def mask(slot, first_kept, end_kept):
            """Zero the rows of a slot that are not of the group, in both operands: the other's may be NaN, and NaN * 0 is NaN."""
            index = lax.broadcasted_iota(jnp.int32, (depth, mask_columns), 0)
            index = plgpu.layout_cast(index, plgpu.Layout.WGMMA)
            kept = (index >= first_kept) & (index < end_kept)
            for slots in (out_slots, in_slots):

                @pl.loop(warpgroup, slots.shape[-1] // mask_columns, step=CONSUMERS)
                def _(part, slots=slots):
                    columns = pl.ds(pl.multiple_of(part * mask_columns, mask_columns), mask_columns)
                    masked_part = slots.at[slot, :, columns]
                    masked_part[...] = jnp.where(kept, masked_part[...], jnp.zeros((), slots.dtype))

            plgpu.commit_smem()
            plgpu.barrier_arrive(masked)
            plgpu.barrier_wait(masked)

        def consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            row_part = pl.ds(pl.multiple_of(warpgroup * consumer_rows, consumer_rows), consumer_rows)

            def compute_tile(entry, out_column, in_column, step):
                num_steps = _num_steps(entry.last, depth)

                def multiply(accumulator):
                    def multiply_step(k, step):
                        slot = lax.rem(step, stages)
                        plgpu.barrier_wait(full.at[slot])
                        first_kept, end_kept = entry.first - k * depth, entry.last - k * depth

                        @pl.when((first_kept > 0) | (end_kept < depth))
                        def _():
                            mask(slot, first_kept, end_kept)

                        plgpu.wgmma(accumulator, out_slots.at[slot, :, row_part].transpose((1, 0)), in_slots.at[slot])
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(step - 1, stages)])

                        return step + 1

                    end = lax.fori_loop(0, num_steps, multiply_step, step)
                    plgpu.wgmma_wait(0)

                    @pl.when(num_steps > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(end - 1, stages)])

                    return accumulator[...]

                shape = (consumer_rows, tiles.in_columns)
                product = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape))
                matrix = gradient.at[entry.group]
                first_row = out_column + warpgroup * consumer_rows
                chunks = itertools.product(
                    range(0, consumer_rows, CHUNK_ROWS), range(0, tiles.in_columns, chunk_columns)
                )
                for chunk, (chunk_row, column) in enumerate(chunks):
                    stage = staging.at[warpgroup, chunk % staged]
                    plgpu.wait_smem_to_gmem(staged - 1, wait_read_only=True)
                    part = product[chunk_row : chunk_row + CHUNK_ROWS, column : column + chunk_columns]
                    stage[...] = part.astype(output_dtype)
                    plgpu.commit_smem()
                    gradient_rows = pl.ds(first_row + chunk_row, CHUNK_ROWS)
                    plgpu.copy_smem_to_gmem(stage, matrix.at[gradient_rows, pl.ds(in_column + column, chunk_columns)])
                return step + num_steps

            for_own_tiles(compute_tile)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup == CONSUMERS, produce, consume)

    return plgpu.kernel(
        grouped_gradient,
        out_type=jax.ShapeDtypeStruct((num_groups, width_out, width_in), output_dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM(
                (stages, depth, tiles.out_columns),
                rows.dtype,
                transforms=swizzled(rows.dtype, swizzle_bytes=operand_swizzle),
            ),
            plgpu.SMEM(
                (stages, depth, tiles.in_columns),
                rows.dtype,
                transforms=swizzled(rows.dtype, swizzle_bytes=operand_swizzle),
            ),
            plgpu.SMEM(
                (CONSUMERS, staged, CHUNK_ROWS, chunk_columns),
                output_dtype,
                transforms=swizzled(output_dtype, swizzle_bytes=gradient_swizzle),
            ),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*_GroupTable.of(groups), cotangent, rows)


class _GroupTable(NamedTuple):
    """The groups in the order in which blocks work on them: largest first."""

    group: Int[Array, "G"]
    """Which group."""
    row: Int[Array, "G"]
    """First row that is copied: the multiple of 8 at or before the group's first."""
    first: Int[Array, "G"]
    """First row that belongs to the group, relative to `row`: 0 to 7."""
    last: Int[Array, "G"]
    """End of the rows that belong to the group, relative to `row`; zero for an empty group."""

    @classmethod
    def of(cls, groups: Groups) -> Self:
        group = jnp.argsort(-groups.sizes, stable=True).astype(jnp.int32)
        starts, sizes = groups.starts[group].astype(jnp.int32), groups.sizes[group].astype(jnp.int32)
        first = starts % ROW_ALIGNMENT
        return cls(group, starts - first, first, jnp.where(sizes > 0, first + sizes, 0))


class _TileGrid(NamedTuple):
    """All tiles of all groups' gradients, in the order in which they are worked on.

    Groups come by size, largest first, and the tiles of a group one after the other, in panels of `panel` tiles along the
    gradient's rows, so that blocks side by side in time share operands in the L2 cache. Hopper has no scheduler of blocks'
    further work, so block b takes the tiles b, 2P - 1 - b, 2P + b, 4P - 1 - b, … of P blocks: of a decreasing sequence of
    costs every block gets the same, but for the cost of one tile, however unequal the groups are.
    """

    num_groups: int
    num_out: int
    num_in: int
    tiles: WeightsGradientTiles

    @classmethod
    def of(cls, num_groups: int, width_out: int, width_in: int, tiles: WeightsGradientTiles) -> Self:
        return cls(num_groups, pl.cdiv(width_out, tiles.out_columns), pl.cdiv(width_in, tiles.in_columns), tiles)

    @property
    def num_tiles(self) -> int:
        return self.num_groups * self.num_out * self.num_in

    def num_tiles_of_block(self, block: Array, num_blocks: int) -> Array:
        turns, rest = divmod(self.num_tiles, num_blocks)
        return turns + (_position(turns, block, num_blocks) < rest).astype(jnp.int32)

    def tile(self, turn: Array, block: Array, num_blocks: int) -> tuple[Array, Array, Array]:
        """The block's tile in its turn: place of the group in `_GroupTable`, first row and first column of the gradient."""
        index = turn * num_blocks + _position(turn, block, num_blocks)
        place = lax.div(index, jnp.int32(self.num_out * self.num_in))
        index -= place * (self.num_out * self.num_in)
        panel = lax.div(index, jnp.int32(self.tiles.panel * self.num_in))
        index -= panel * (self.tiles.panel * self.num_in)
        panel_start = panel * self.tiles.panel
        height = jnp.minimum(self.num_out - panel_start, self.tiles.panel)
        column = lax.div(index, height)
        row = panel_start + index - column * height
        return place, row * self.tiles.out_columns, column * self.tiles.in_columns


def _position(turn: int | Array, block: Array, num_blocks: int) -> Array:
    return jnp.where(turn % 2 == 0, block, num_blocks - 1 - block)


def _num_steps(last: Array, depth: int) -> Array:
    return lax.div(last + (depth - 1), jnp.int32(depth))


def _check_operands(cotangent: Array, rows: Array, output_dtype: jnp.dtype) -> None:
    if cotangent.ndim != 2 or rows.ndim != 2 or cotangent.shape[0] != rows.shape[0]:
        raise ValueError(
            f"cotangent [M, N] and rows [M, D] must be matrices that share M, got {cotangent.shape} and {rows.shape}"
        )
    if cotangent.dtype != rows.dtype or rows.dtype not in (jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"cotangent and rows must both be bfloat16 or both float16, got {cotangent.dtype} and {rows.dtype}"
        )
    if output_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"output_dtype must be bfloat16, float16 or float32, got {output_dtype}")
    for name, width in (("N", cotangent.shape[1]), ("D", rows.shape[1])):
        if width == 0 or width % LEAST_WIDTH:
            raise ValueError(f"{name} must be a positive multiple of {LEAST_WIDTH}, got {width}")
