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
from .blackwell_memory import ACCUMULATORS, EPILOGUE_VALUES, RESULT_BUFFERS, SWIZZLE_BYTES
from .blackwell_row_tiles import check_blackwell_row_tiles
from .epilogue import activate, load_vector
from .padding import pad_to_multiples
from .ref import Ref
from .schedule import ROW_ALIGNMENT, TileTable, num_tiles
from .stores import store_rows, swizzled
from .tiles import RowTiles

_STORING, _MULTIPLYING = 0, 1  # warpgroups
_COPY_WARP, _MULTIPLY_WARP = 0, 1  # warps of the multiplying warpgroup


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
        rows: bfloat16 or float16, D a multiple of 8.
        weights: of the same dtype, N a multiple of 8. With `contract="in"` the `projections` matrices of each group, (out, in):
            their last axis is contracted (forward). With "out" one matrix per group, whose middle axis is contracted (gradient
            of rows).
        table: tiles of `tiles.rows` rows.
        tiles: tile sizes, legal by `check_blackwell_row_tiles`.
        projections: matrices per group whose results meet in the activation: 2 (0 = gate, 1 = up) or 1.
        contract: see `weights`.
        bias: added to each projection.
        activation: of the projections; None if there is one projection, which is then the result.
        row_scale: float32 factor of each row of the result.
        keep_projected: also return what enters the activation, for the backward pass.
        zero_groups: whether the table may hold tiles of group -1, whose rows become zero without anything being read.
        exact_rows: store no row outside a tile's own (compact layout); otherwise whole multiples of 8 rows (aligned layout).
        output_dtype: bfloat16, float16 or float32.
        device: what the kernel runs on.

    Returns:
        [M, N]; with `keep_projected` also [M, projections, N]. Rows of no tile are not written: they hold anything, NaN too.

    Raises:
        ValueError: tiles that don't fit, or several projections whose outputs are contracted.
    """
    if contract == "out" and projections != 1:
        raise ValueError(f"contract='out' takes one matrix per group, got projections={projections}")
    check_blackwell_row_tiles(tiles, projections, rows.dtype.itemsize, device)
    dtype, output_dtype = rows.dtype, jnp.dtype(output_dtype)
    true_shape = rows.shape[0], weights.shape[1] if contract == "in" else weights.shape[2]
    # Swizzled copies address whole rows of 128 bytes, 8 at a time. Nothing is padded at widths of models.
    whole = SWIZZLE_BYTES // dtype.itemsize
    rows, weights = pad_to_multiples(rows, ROW_ALIGNMENT, whole), pad_to_multiples(weights, 1, whole, whole)
    num_rows, width_in = rows.shape
    width_out = weights.shape[1] if contract == "in" else weights.shape[2]
    width = projections * tiles.columns
    chunk = SWIZZLE_BYTES // output_dtype.itemsize
    if not exact_rows:  # single rows can only leave from multiples of 128 bytes, so each is as wide
        chunk = min(chunk, EPILOGUE_VALUES // projections)
    operands = {
        **table._asdict(),
        "rows": rows,
        "weights": weights,
        # What is read without a bulk copy must exist for the last, partial tile too.
        "bias": None if bias is None else pad_to_multiples(bias.astype(jnp.float32), 1, math.lcm(whole, tiles.columns)),
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

    def grouped_rows(*refs: Ref, **scratch: Ref) -> None:
        named = dict(zip((*operands, *outputs), refs, strict=True)) | scratch

        @pl.when(lax.axis_index("warpgroup") == _MULTIPLYING)
        def _():
            @plgpu.warp_map
            def _(warp):
                pl.when(warp == _COPY_WARP)(lambda: _copy(problem, named))
                pl.when(warp == _MULTIPLY_WARP)(lambda: _multiply(problem, named))

        pl.when(lax.axis_index("warpgroup") == _STORING)(lambda: _store(problem, named))

    results = plgpu.kernel(
        grouped_rows,
        out_type=tuple(outputs.values()),
        grid=(device.multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=dict(
            rows_smem=plgpu.SMEM((tiles.stages, tiles.rows, tiles.depth), dtype, transforms=swizzled(dtype)),
            weights_smem=plgpu.SMEM(
                (tiles.stages, *((width, tiles.depth) if contract == "in" else (tiles.depth, width))),
                dtype,
                transforms=swizzled(dtype),
            ),
            result_smem=plgpu.SMEM(
                (RESULT_BUFFERS, tiles.rows, chunk),
                output_dtype,
                transforms=swizzled(output_dtype, 1 if exact_rows else ROW_ALIGNMENT, chunk * output_dtype.itemsize),
            ),
            accumulators=plgpu.TMEM((tiles.rows, ACCUMULATORS * width), jnp.float32),
            filled=plgpu.Barrier(num_arrivals=1 + projections, num_barriers=tiles.stages),
            consumed=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.stages, orders_tensor_core=True),
            multiplied=plgpu.Barrier(num_arrivals=1, num_barriers=ACCUMULATORS, orders_tensor_core=True),
            taken=plgpu.Barrier(num_arrivals=1, num_barriers=ACCUMULATORS, orders_tensor_core=True),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )(*operands.values())
    results = tuple(result[: true_shape[0], ..., : true_shape[1]] for result in results)
    return results if keep_projected else results[0]


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

    @property
    def columns(self) -> int:
        """Of one accumulator: gate and up side by side."""
        return self.projections * self.tiles.columns


class _Tile(NamedTuple):
    """One output tile."""

    column: Array
    """Index of its columns."""
    group: Array
    row: Array
    first: Array
    last: Array


def _num_own_tiles(problem: _Problem, ends: Ref) -> Array:
    """How many tiles this block computes: every `multiprocessors`-th."""
    total = num_tiles(ends) * pl.cdiv(problem.width_out, problem.tiles.columns)
    return lax.div(total - lax.axis_index("multiprocessor") + problem.multiprocessors - 1, problem.multiprocessors)


def _tile(problem: _Problem, index: Array, named: dict[str, Ref]) -> _Tile:
    """The `index`-th tile of this block: panels of rows one after the other, column by column within a panel.

    Blocks work on neighbouring tiles at any time; within a panel these share the weights of a column or the rows of a tile.
    """
    panel, columns = problem.tiles.panel, pl.cdiv(problem.width_out, problem.tiles.columns)
    position = lax.axis_index("multiprocessor") + index * problem.multiprocessors
    which = lax.div(position, panel * columns)
    within = position - which * (panel * columns)
    height = jnp.minimum(num_tiles(named["ends"]) - which * panel, panel)
    column = lax.div(within, height)
    entry = which * panel + within - column * height
    return _Tile(column, *(named[name][entry] for name in ("group", "row", "first", "last")))


def _for_each_multiplied_tile(
    problem: _Problem,
    named: dict[str, Ref],
    visit: Callable[[_Tile, Array], None],
    pass_zeros: Callable[[_Tile], None] | None = None,
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

    return lax.fori_loop(0, _num_own_tiles(problem, named["ends"]), one_tile, jnp.int32(0))


def _copy(problem: _Problem, named: dict[str, Ref]) -> None:
    """Copy rows and weights, step by step of tile by tile, as far ahead as there is room."""
    tiles, projections, steps = problem.tiles, problem.projections, problem.steps
    rows, weights = named["rows"], named["weights"]
    rows_smem, weights_smem, filled, consumed = (
        named[name] for name in ("rows_smem", "weights_smem", "filled", "consumed")
    )
    first_matrix = named["first_matrix"][0]

    def copy_tile(tile: _Tile, multiplied: Array) -> None:
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

    total = _for_each_multiplied_tile(problem, named, copy_tile) * steps

    # The tensor core reports to these barriers on its own, so they must outlive its last report.
    @pl.loop(jnp.maximum(total - tiles.stages, 0), total)
    def _(step):
        plgpu.barrier_wait(consumed.at[lax.rem(step, tiles.stages)])


def _multiply(problem: _Problem, named: dict[str, Ref]) -> None:
    """Multiply what has been copied, each tile into the accumulator that is free."""
    tiles, steps = problem.tiles, problem.steps
    rows_smem, weights_smem, filled, consumed, multiplied_barrier, taken = (
        named[name] for name in ("rows_smem", "weights_smem", "filled", "consumed", "multiplied", "taken")
    )

    def multiply_tile(tile: _Tile, multiplied: Array) -> None:  # noqa: ARG001 - the copies know where the tile is
        accumulator, which = _accumulator(problem, named, multiplied)

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

    total = _for_each_multiplied_tile(problem, named, multiply_tile)

    @pl.loop(jnp.maximum(total - ACCUMULATORS, 0), total)
    def _(multiplied):
        plgpu.barrier_wait(taken.at[lax.rem(multiplied, ACCUMULATORS)])


def _accumulator(problem: _Problem, named: dict[str, Ref], multiplied: Array) -> tuple[Ref, Array]:
    """The accumulator of a tile, and its index: they take turns."""
    which = lax.rem(multiplied, ACCUMULATORS)
    begin = which * problem.columns
    return named["accumulators"].at[:, pl.ds(begin, problem.columns)], which


def _store(problem: _Problem, named: dict[str, Ref]) -> None:
    """Bias, activation and scale of each complete accumulator, then the stores, one chunk of columns after the other."""
    tiles, projections = problem.tiles, problem.projections
    num_buffers, _, chunk = named["result_smem"].shape
    num_chunks = tiles.columns // chunk
    num_destinations = 1 + (projections if "projected" in named else 0)

    def store_chunks(tile: _Tile, compute: Callable[[Array, Array], tuple[list[Array], Array]]) -> None:
        """Store what `compute` returns for each chunk: what enters the activation, and the result."""
        row = pl.multiple_of(tile.row, ROW_ALIGNMENT)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before may have left through any buffer last

        @pl.loop(0, num_chunks)
        def _(index):
            column = tile.column * tiles.columns + index * chunk
            projected, result = compute(index, column)
            stores = [(result, named["result"])]
            if "projected" in named:
                stores = [(projected[p], named["projected"].at[:, p]) for p in range(projections)] + stores
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

    def store_tile(tile: _Tile, multiplied: Array) -> None:
        accumulator, which = _accumulator(problem, named, multiplied)
        scale = None
        if "row_scale" in named:
            row = pl.multiple_of(tile.row, ROW_ALIGNMENT)
            scale = load_vector(named["row_scale"].at[pl.ds(row, tiles.rows)])

        def compute(index: Array, column: Array) -> tuple[list[Array], Array]:
            projected = []
            for projection in range(projections):
                source = accumulator.at[:, pl.ds(projection * tiles.columns + index * chunk, chunk)]
                projected.append(plgpu.async_load_tmem(source, layout=plgpu.Layout.TCGEN05))

            @pl.when(index == num_chunks - 1)
            def _():
                plgpu.wait_load_tmem()
                plgpu.barrier_arrive(named["taken"].at[which])

            if "bias" in named:
                for projection in range(projections):
                    source = named["bias"].at[tile.group * projections + projection, pl.ds(column, chunk)]
                    projected[projection] += load_vector(source)[None, :]
            result = activate(problem.activation, projected)
            return projected, result if scale is None else result * scale[:, None]

        plgpu.barrier_wait(named["multiplied"].at[which])
        store_chunks(tile, compute)

    def store_zeros(tile: _Tile) -> None:
        zeros = plgpu.layout_cast(jnp.zeros((tiles.rows, chunk), jnp.float32), plgpu.Layout.TCGEN05)
        store_chunks(tile, lambda *_: ([zeros] * projections, zeros))

    _for_each_multiplied_tile(problem, named, store_tile, store_zeros)
    plgpu.wait_smem_to_gmem(0)
