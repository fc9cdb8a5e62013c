"""The gradient of a grouped matmul with respect to its weights, for Hopper: a matmul grouped over its contracted dimension.

A persistent grid with one block for each multiprocessor works on the tiles of all groups' gradients. In a block one warpgroup
only copies (the producer), and two multiply (the consumers), each a half of the tile's rows. Slots of shared memory go round
by a count of steps over all of the block's tiles, so that the producer fills them for the next tile while the consumers are
still storing this one.

Both operands have the contracted dimension first, as wgmma takes 16-bit operands from shared memory either way round. The first
and the last step of a group may hold rows of its neighbours: the consumers zero those in shared memory, while the step before
is still being multiplied.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..device import GpuDevice
from ..groups import Groups
from .barriers import wait_for_last_uses
from .kernel_call import call_kernel
from .limits import LEAST_WIDTH, swizzle_bytes
from .padding import pad_to_multiples
from .ref import Ref
from .schedule import ROW_ALIGNMENT
from .stores import swizzled
from .tile_order import BLOCK, place_in_panels
from .tiles import WeightsGradientTiles
from .weights_gradient_tiles import CHUNK_ROWS, CONSUMERS, staged_chunks

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


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
    for name, width in (("N", cotangent.shape[1]), ("D", rows.shape[1])):
        if width == 0 or width % LEAST_WIDTH:
            raise ValueError(f"{name} must be a positive multiple of {LEAST_WIDTH}, got {width}")
    shape = groups.sizes.shape[0], cotangent.shape[1], rows.shape[1]
    problem = _Problem(
        tiles=tiles,
        # One for both operands, as the instruction wants it.
        operand_swizzle=min(swizzle_bytes(width, rows.dtype.itemsize) for width in shape[1:]),
        gradient_swizzle=swizzle_bytes(shape[2], output_dtype.itemsize),
        staged=staged_chunks(tiles, rows.dtype.itemsize, output_dtype.itemsize, device),
        grid=_TileGrid.of(shape, tiles, device),
    )
    # Swizzled copies address 8 rows at a time. The rows that are added belong to no group.
    cotangent, rows = (pad_to_multiples(operand, ROW_ALIGNMENT, 1) for operand in (cotangent, rows))

    def grouped_gradient(named: dict[str, Ref]) -> None:
        warpgroup = lax.axis_index("warpgroup")
        own = _OwnTiles.of(problem.grid)
        lax.cond(
            warpgroup == CONSUMERS,
            lambda: _copy(problem, own, named),
            lambda: _multiply(problem, own, warpgroup, named),
        )

    return call_kernel(
        grouped_gradient,
        operands={**_GroupTable.of(groups)._asdict(), "cotangent": cotangent, "rows": rows},
        outputs=dict(gradient=jax.ShapeDtypeStruct(shape, output_dtype)),
        scratch=_scratch(problem, rows.dtype, output_dtype),
        num_blocks=problem.grid.num_blocks,
        num_warpgroups=CONSUMERS + 1,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )["gradient"]


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

    Groups come by size, largest first, and the tiles of a group one after the other, in panels of its gradient's rows. Hopper has
    no scheduler of blocks' further work, so block b takes the tiles b, 2P - 1 - b, 2P + b, 4P - 1 - b, … of P blocks: of a
    decreasing sequence of costs every block gets the same, but for the cost of one tile, however unequal the groups are.
    """

    num_groups: int
    num_out: int
    num_in: int
    num_blocks: int
    """No more than there are tiles."""
    tiles: WeightsGradientTiles

    @classmethod
    def of(cls, shape: tuple[int, int, int], tiles: WeightsGradientTiles, device: GpuDevice) -> Self:
        """For a gradient of a shape."""
        num_groups, width_out, width_in = shape
        num_out, num_in = pl.cdiv(width_out, tiles.out_columns), pl.cdiv(width_in, tiles.in_columns)
        num_blocks = min(device.multiprocessors, num_groups * num_out * num_in)
        return cls(num_groups, num_out, num_in, num_blocks, tiles)

    def num_tiles_of(self, block: Array) -> Array:
        turns, rest = divmod(self.num_groups * self.num_out * self.num_in, self.num_blocks)
        return turns + (self._position(turns, block) < rest).astype(jnp.int32)

    def tile(self, turn: Array, block: Array) -> tuple[Array, Array, Array]:
        """The block's tile in its turn: place of the group in `_GroupTable`, first row and first column of the gradient."""
        index = turn * self.num_blocks + self._position(turn, block)
        place = lax.div(index, jnp.int32(self.num_out * self.num_in))
        panel = self.tiles.panel
        row, column = place_in_panels(
            index - place * (self.num_out * self.num_in),
            panel,
            self.num_in,
            lambda which: jnp.minimum(self.num_out - which * panel, panel),
        )
        return place, row * self.tiles.out_columns, column * self.tiles.in_columns

    def _position(self, turn: int | Array, block: Array) -> Array:
        return jnp.where(turn % 2 == 0, block, self.num_blocks - 1 - block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """What is static in the body of the kernel."""

    tiles: WeightsGradientTiles
    operand_swizzle: int
    """Bytes."""
    gradient_swizzle: int
    """Bytes."""
    staged: int
    """Chunks of its output that a consumer stages at once."""
    grid: _TileGrid

    @property
    def consumer_rows(self) -> int:
        """Rows of a tile that one consumer computes."""
        return self.tiles.out_columns // CONSUMERS


def _scratch(problem: _Problem, dtype: jnp.dtype, output_dtype: jnp.dtype) -> dict[str, Any]:
    """Types of a block's own memory and barriers, by name, for operands and a gradient of these dtypes."""
    tiles, layout = problem.tiles, swizzled(dtype, swizzle_bytes=problem.operand_swizzle)
    return dict(
        cotangent_smem=plgpu.SMEM((tiles.stages, tiles.depth, tiles.out_columns), dtype, transforms=layout),
        rows_smem=plgpu.SMEM((tiles.stages, tiles.depth, tiles.in_columns), dtype, transforms=layout),
        staged_smem=plgpu.SMEM(
            (CONSUMERS, problem.staged, CHUNK_ROWS, problem.gradient_swizzle // output_dtype.itemsize),
            output_dtype,
            transforms=swizzled(output_dtype, swizzle_bytes=problem.gradient_swizzle),
        ),
        copied=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        freed=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages),
        masked=plgpu.Barrier(num_arrivals=CONSUMERS),
    )


class _Tile(NamedTuple):
    """One tile of a group's gradient; rows as in `_GroupTable`."""

    group: Array
    row: Array
    first: Array
    last: Array
    out_column: Array
    in_column: Array

    def steps(self, depth: int) -> Array:
        """Of the pipeline; none for an empty group."""
        return lax.div(self.last + (depth - 1), jnp.int32(depth))


class _OwnTiles(NamedTuple):
    """The tiles of this block."""

    grid: _TileGrid
    block: Array
    num_tiles: Array

    @classmethod
    def of(cls, grid: _TileGrid) -> Self:
        block = lax.axis_index(BLOCK)
        return cls(grid, block, grid.num_tiles_of(block))

    def for_each(self, visit: Callable[[_Tile, Array], Array], named: dict[str, Ref]) -> Array:
        """Call `visit(tile, step)`, which returns the next step, for each tile; returns the last one's.

        A group's entry of the table is read while the tile before it is computed.
        """

        def entry(turn: Array) -> _GroupTable:
            """That of the tile in its turn; of the last tile in later turns."""
            place, _, _ = self.grid.tile(jnp.minimum(turn, self.num_tiles - 1), self.block)
            return _GroupTable(*(named[name][place] for name in _GroupTable._fields))

        def visit_and_read_ahead(turn: Array, carry: tuple[Array, _GroupTable]) -> tuple[Array, _GroupTable]:
            step, current = carry
            ahead = entry(turn + 1)
            _, out_column, in_column = self.grid.tile(turn, self.block)
            return visit(_Tile(*current, out_column, in_column), step), ahead

        # There are no more blocks than tiles, so each has a first one.
        return lax.fori_loop(0, self.num_tiles, visit_and_read_ahead, (jnp.int32(0), entry(jnp.int32(0))))[0]


def _copy(problem: _Problem, own: _OwnTiles, named: dict[str, Ref]) -> None:
    """Copy both operands, step by step of tile by tile, as far ahead as there is room."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    tiles, copied, freed = problem.tiles, named["copied"], named["freed"]

    def copy_tile(tile: _Tile, step: Array) -> Array:
        def copy_step(k: Array, step: Array) -> Array:
            slot = lax.rem(step, tiles.stages)

            @pl.when(step >= tiles.stages)
            def _():
                plgpu.barrier_wait(freed.at[slot])

            here = pl.ds(pl.multiple_of(tile.row + k * tiles.depth, ROW_ALIGNMENT), tiles.depth)
            for name, column, width in (
                ("cotangent", tile.out_column, tiles.out_columns),
                ("rows", tile.in_column, tiles.in_columns),
            ):
                source = named[name].at[here, pl.ds(column, width)]
                plgpu.copy_gmem_to_smem(source, named[f"{name}_smem"].at[slot], copied.at[slot])
            return step + 1

        return lax.fori_loop(0, tile.steps(tiles.depth), copy_step, step)

    wait_for_last_uses(freed, own.for_each(copy_tile, named), tiles.stages)


def _multiply(problem: _Problem, own: _OwnTiles, warpgroup: Array, named: dict[str, Ref]) -> None:
    """Multiply what has been copied, and store the results, tile by tile."""
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    accumulator_type = plgpu.WGMMAAccumulatorRef((problem.consumer_rows, problem.tiles.in_columns))
    row_part = pl.ds(pl.multiple_of(warpgroup * problem.consumer_rows, problem.consumer_rows), problem.consumer_rows)

    def compute_tile(tile: _Tile, step: Array) -> Array:
        num_steps = tile.steps(problem.tiles.depth)
        product = pl.run_scoped(
            lambda accumulator: _accumulate(problem, accumulator, tile, row_part, step, num_steps, warpgroup, named),
            accumulator_type,
        )
        _store(problem, product, tile, warpgroup, named)
        return step + num_steps

    own.for_each(compute_tile, named)
    plgpu.wait_smem_to_gmem(0)


def _accumulate(
    problem: _Problem,
    accumulator: Ref,
    tile: _Tile,
    row_part: pl.Slice,
    step: Array,
    num_steps: Array,
    warpgroup: Array,
    named: dict[str, Ref],
) -> Float[Array, "consumer_rows in_columns"]:
    """A consumer's part of the products, summed over the steps of a tile."""
    depth, stages, freed = problem.tiles.depth, problem.tiles.stages, named["freed"]

    def multiply_step(k: Array, step: Array) -> Array:
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(named["copied"].at[slot])
        first_kept, end_kept = tile.first - k * depth, tile.last - k * depth

        @pl.when((first_kept > 0) | (end_kept < depth))
        def _():
            _mask(problem, slot, first_kept, end_kept, warpgroup, named)

        transposed = named["cotangent_smem"].at[slot, :, row_part].transpose((1, 0))
        plgpu.wgmma(accumulator, transposed, named["rows_smem"].at[slot])
        plgpu.wgmma_wait(1)

        @pl.when(k > 0)
        def _():
            plgpu.barrier_arrive(freed.at[lax.rem(step - 1, stages)])

        return step + 1

    end = lax.fori_loop(0, num_steps, multiply_step, step)
    plgpu.wgmma_wait(0)

    @pl.when(num_steps > 0)
    def _():
        plgpu.barrier_arrive(freed.at[lax.rem(end - 1, stages)])

    return accumulator[...]


def _mask(
    problem: _Problem, slot: Array, first_kept: Array, end_kept: Array, warpgroup: Array, named: dict[str, Ref]
) -> None:
    """Zero the rows of a slot that are not of the group, in both operands: the other's may be NaN, and NaN * 0 is NaN."""
    dtype = named["rows_smem"].dtype
    mask_columns = problem.operand_swizzle // dtype.itemsize
    index = lax.broadcasted_iota(jnp.int32, (problem.tiles.depth, mask_columns), 0)
    index = plgpu.layout_cast(index, plgpu.Layout.WGMMA)
    kept = (index >= first_kept) & (index < end_kept)
    for slots in (named["cotangent_smem"], named["rows_smem"]):

        @pl.loop(warpgroup, slots.shape[-1] // mask_columns, step=CONSUMERS)
        def _(part, slots=slots):
            columns = pl.ds(pl.multiple_of(part * mask_columns, mask_columns), mask_columns)
            masked_part = slots.at[slot, :, columns]
            masked_part[...] = jnp.where(kept, masked_part[...], jnp.zeros((), dtype))

    plgpu.commit_smem()
    plgpu.barrier_arrive(named["masked"])
    plgpu.barrier_wait(named["masked"])


def _store(
    problem: _Problem,
    product: Float[Array, "consumer_rows in_columns"],
    tile: _Tile,
    warpgroup: Array,
    named: dict[str, Ref],
) -> None:
    """Store a consumer's part of a tile, one chunk after the other."""
    _, staged, _, chunk_columns = named["staged_smem"].shape
    matrix = named["gradient"].at[tile.group]
    first_row = tile.out_column + warpgroup * problem.consumer_rows
    # Without those beyond a narrow gradient: see `store_rows`.
    columns = range(0, min(problem.tiles.in_columns, matrix.shape[-1]), chunk_columns)
    chunks = list(itertools.product(range(0, problem.consumer_rows, CHUNK_ROWS), columns))
    staged = math.gcd(staged, len(chunks))  # as in `staged_chunks`, so that chunk c of every tile has the same place
    for chunk, (chunk_row, column) in enumerate(chunks):
        stage = named["staged_smem"].at[warpgroup, chunk % staged]
        plgpu.wait_smem_to_gmem(staged - 1, wait_read_only=True)
        part = product[chunk_row : chunk_row + CHUNK_ROWS, column : column + chunk_columns]
        stage[...] = part.astype(stage.dtype)
        plgpu.commit_smem()
        gradient_rows = pl.ds(first_row + chunk_row, CHUNK_ROWS)
        plgpu.copy_smem_to_gmem(stage, matrix.at[gradient_rows, pl.ds(tile.in_column + column, chunk_columns)])
