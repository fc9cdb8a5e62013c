"""Few rows times the matrix of their group, on Hopper: the kernel for decoding, which reads memory and does little else.

The operands change sides: 64 rows of weights, which are output columns, fill the side of the tensor cores' instruction that is
always 64 wide, and the 8 to 64 rows of tokens its narrow side, so that one row does not cost what 64 do. Results come out
transposed and turn around on their way through shared memory.

One block per multiprocessor walks over units of work: a tile of rows, a tile of columns, a part of the contracted dimension.
One warpgroup only copies, so that nearly all of the shared memory is filled, or being filled, at any time, across the ends of
units; the others multiply. Tiles of one group and the same columns are neighbours in the order of units: they run at the same
time, and all but the first find their weights in the L2 cache.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Float

from ..activations import Activation
from ..device import GpuDevice
from .barriers import wait_for_last_uses
from .compiler_params import OWN_BARRIERS
from .epilogue import activate
from .kernel_call import call_kernel
from .limits import swizzle_bytes
from .ref import Ref
from .schedule import ROW_ALIGNMENT, TileTable, num_tiles
from .stores import store_rows, swizzled
from .stream_tiles import check_stream_tiles, multiplying_warpgroups
from .tile_order import num_own, own_position
from .tiles import StreamTiles

COPYING_REGISTERS = 56
MULTIPLYING_REGISTERS = 224
"""Per thread; what two warpgroups that multiply leave to one that copies."""
LEAST_FACTORS = 32
"""Room for factors of rows, per warpgroup: bulk copies arrive at multiples of 128 bytes."""


def stream_weights(
    rows: Float[Array, "M D"],
    weights: Float[Array, "GP N D"],
    table: TileTable,
    *,
    tiles: StreamTiles,
    projections: int = 1,
    bias: Float[Array, "GP N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Float[Array, "M N"]:
    """row_scale * activation(rows @ matrices.T + bias), the matrices being those of each row's group.

    Accumulates, adds, activates and scales in float32, then rounds once to `output_dtype`. The same result every time: parts
    of a split contraction are summed in their order.

    Args:
        rows: bfloat16 or float16, in the aligned layout (`schedule.py`); padding rows may hold anything, NaN too: they spoil
            themselves alone. M a multiple of 8, D of 16.
        weights: of the same dtype, the `projections` matrices of each group, (out, in); N a multiple of 16, or
            of 8 if the kernel writes float32: with float32 results or a split contraction.
        table: tiles of `tiles.rows` rows.
        tiles: tile sizes, legal by `check_stream_tiles`.
        projections: matrices per group whose results meet in the activation: 2 (0 = gate, 1 = up) or 1.
        bias: float32, bfloat16 or float16, added to each projection.
        activation: of the projections; None if there is one projection, which is then the result.
        row_scale: float32 factor of each row of the result.
        output_dtype: bfloat16, float16 or float32.
        device: what the kernel runs on.

    Returns:
        [M, N]. Rows of no tile are not written: they hold anything, NaN too.

    Raises:
        ValueError: sizes that bulk copies cannot address, tiles that don't fit, or an activation of another number of
            projections.
    """
    num_rows, width_in = rows.shape
    width_out = weights.shape[1]
    dtype, output_dtype = rows.dtype, jnp.dtype(output_dtype)
    check_stream_tiles(tiles, projections, width_in, dtype.itemsize, device, output_dtype.itemsize)
    if num_rows % ROW_ALIGNMENT:
        raise ValueError(f"the number of rows must be a multiple of {ROW_ALIGNMENT}, got {num_rows}")
    expected = 1 if activation is None or not activation.is_gated else 2
    if projections != expected:
        raise ValueError(f"activation {activation} is a function of {expected} projections, got {projections}")

    problem = _Problem(
        tiles=tiles,
        projections=projections,
        activation=activation,
        width_in=width_in,
        width_out=width_out,
        output_dtype=output_dtype if tiles.splits == 1 else jnp.dtype(jnp.float32),
        multiprocessors=device.multiprocessors,
    )
    swizzle_bytes(width_out, problem.output_dtype.itemsize)
    operands = {**table._asdict(), "rows": rows, "weights": weights, "bias": bias}
    if problem.is_whole:
        operands["row_scale"] = None if row_scale is None else row_scale.astype(jnp.float32)
    result = _call(problem, {name: operand for name, operand in operands.items() if operand is not None})
    if not problem.is_transposed:
        return result
    if problem.is_whole:
        return result[0].T

    parts = result.reshape(tiles.splits, projections, width_out, num_rows)
    projected = parts[0]
    for part in range(1, tiles.splits):
        projected = projected + parts[part]
    values = projected[0] if activation is None else activation(*projected)
    if row_scale is not None:
        values = values * row_scale
    return values.T.astype(output_dtype)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is static in the body of the kernel."""

    tiles: StreamTiles
    projections: int
    activation: Activation | None
    width_in: int
    width_out: int
    output_dtype: jnp.dtype
    """Of what the kernel writes."""
    multiprocessors: int

    @property
    def is_whole(self) -> bool:
        """Whether a unit contracts over the whole dimension, so that its result can be finished in the kernel."""
        return self.tiles.splits == 1

    @property
    def is_transposed(self) -> bool:
        """Whether the kernel writes its results as they come, [N, M]: only elements of two bytes are turned around on the way."""
        return self.output_dtype.itemsize != 2

    @property
    def results(self) -> int:
        """Arrays that a unit writes to."""
        return 1 if self.is_whole else self.projections

    @property
    def warpgroups(self) -> int:
        """Those that multiply."""
        return multiplying_warpgroups(self.tiles)

    @property
    def part_columns(self) -> int:
        """Columns of a tile that one warpgroup computes."""
        return self.tiles.columns // self.warpgroups

    @property
    def column_tiles(self) -> int:
        return pl.cdiv(self.width_out, self.tiles.columns)

    @property
    def steps(self) -> int:
        """Of the pipeline, for the whole contracted dimension."""
        return pl.cdiv(self.width_in, self.tiles.depth)


def _call(problem: _Problem, operands: dict[str, Array]) -> Array:
    """The kernel: [M, N], or transposed [splits * results, N, M]."""
    tiles, projections = problem.tiles, problem.projections
    warpgroups, part_columns = problem.warpgroups, problem.part_columns
    num_rows, dtype, output_dtype = operands["rows"].shape[0], operands["rows"].dtype, problem.output_dtype
    layout = swizzled(dtype, swizzle_bytes=swizzle_bytes(problem.width_in, dtype.itemsize))
    if problem.is_transposed:
        shape = (tiles.splits * problem.results, problem.width_out, num_rows)
        result_shape = (tiles.rows // ROW_ALIGNMENT, part_columns, ROW_ALIGNMENT)
        result_swizzle = swizzle_bytes(ROW_ALIGNMENT, output_dtype.itemsize)
    else:
        shape = (num_rows, problem.width_out)
        result_shape = (tiles.rows, part_columns)
        result_swizzle = swizzle_bytes(problem.width_out, output_dtype.itemsize)
    scratch = dict(
        rows_smem=plgpu.SMEM((tiles.stages, tiles.rows, tiles.depth), dtype, transforms=layout),
        weights_smem=plgpu.SMEM(
            (tiles.stages, warpgroups, projections * part_columns, tiles.depth), dtype, transforms=layout
        ),
        result_smem=plgpu.SMEM(
            (warpgroups, problem.results, *result_shape),
            output_dtype,
            transforms=swizzled(output_dtype, swizzle_bytes=result_swizzle),
        ),
        filled=plgpu.Barrier(num_arrivals=1 + warpgroups * projections, num_barriers=tiles.stages),
        consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=tiles.stages),
    )
    if "bias" in operands:
        scratch["bias_smem"] = plgpu.SMEM((warpgroups, projections, part_columns), operands["bias"].dtype)
    if "row_scale" in operands:
        scratch["row_scale_smem"] = plgpu.SMEM((warpgroups, max(tiles.rows, LEAST_FACTORS)), jnp.float32)
    vectors = (projections if "bias" in operands else 0) + ("row_scale" in operands)
    if vectors:
        scratch["vectors_filled"] = plgpu.Barrier(num_arrivals=vectors, num_barriers=warpgroups)

    def stream(named: dict[str, Ref]) -> None:
        copying = lax.axis_index("warpgroup") == warpgroups
        lax.cond(copying, lambda: _copy(problem, named), lambda: _multiply(problem, named))

    return call_kernel(
        stream,
        operands=operands,
        outputs=dict(result=jax.ShapeDtypeStruct(shape, output_dtype)),
        scratch=scratch,
        num_blocks=problem.multiprocessors,
        num_warpgroups=warpgroups + 1,
        compiler_params=OWN_BARRIERS,
    )["result"]


class _Unit(NamedTuple):
    """What a block computes at a time."""

    group: Array
    row: Array
    last: Array
    """End of the tile's rows that belong to the group, relative to `row`."""
    column: Array
    """First column."""
    part: Array | int
    """Part of the contracted dimension."""
    first_step: Array | int
    last_step: Array | int


def _num_own_units(problem: _Problem, ends: Ref) -> Array:
    """How many units this block computes."""
    return num_own(num_tiles(ends) * problem.column_tiles * problem.tiles.splits, problem.multiprocessors)


def _unit(problem: _Problem, index: Array, named: dict[str, Ref]) -> _Unit:
    """The `index`-th unit of this block. Of all units, those of one column tile are neighbours, in the order of the rows."""
    position = own_position(index, problem.multiprocessors)
    count = num_tiles(named["ends"])
    column_and_part = lax.div(position, count)
    entry = position - column_and_part * count
    part, first_step, last_step = 0, 0, problem.steps
    column_tile = column_and_part
    if not problem.is_whole:
        part = lax.div(column_and_part, problem.column_tiles)
        column_tile = column_and_part - part * problem.column_tiles
        first_step, last_step = (lax.div(p * problem.steps, problem.tiles.splits) for p in (part, part + 1))
    return _Unit(
        group=named["group"][entry],
        row=pl.multiple_of(named["row"][entry], ROW_ALIGNMENT),
        last=named["last"][entry],
        column=column_tile * problem.tiles.columns,
        part=part,
        first_step=first_step,
        last_step=last_step,
    )


def _copy(problem: _Problem, named: dict[str, Ref]) -> None:
    """Copy rows and weights, step by step of unit by unit, as far ahead as there is room."""
    plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
    tiles, projections = problem.tiles, problem.projections
    filled, consumed = named["filled"], named["consumed"]
    first_matrix = named["first_matrix"][0]

    def copy_unit(index: Array, step: Array) -> Array:
        unit = _unit(problem, index, named)
        matrix = first_matrix + unit.group

        def copy_step(k: Array, step: Array) -> Array:
            slot = lax.rem(step, tiles.stages)

            @pl.when(step >= tiles.stages)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            depth = pl.ds(k * tiles.depth, tiles.depth)
            for warpgroup in range(problem.warpgroups):
                columns = pl.ds(unit.column + warpgroup * problem.part_columns, problem.part_columns)
                for projection in range(projections):
                    source = named["weights"].at[matrix * projections + projection, columns, depth]
                    beside = pl.ds(projection * problem.part_columns, problem.part_columns)
                    plgpu.copy_gmem_to_smem(source, named["weights_smem"].at[slot, warpgroup, beside], filled.at[slot])
            source = named["rows"].at[pl.ds(unit.row, tiles.rows), depth]
            plgpu.copy_gmem_to_smem(source, named["rows_smem"].at[slot], filled.at[slot])
            return step + 1

        return lax.fori_loop(unit.first_step, unit.last_step, copy_step, step)

    steps = lax.fori_loop(0, _num_own_units(problem, named["ends"]), copy_unit, jnp.int32(0))
    wait_for_last_uses(consumed, steps, tiles.stages)


def _multiply(problem: _Problem, named: dict[str, Ref]) -> None:
    """Multiply what has been copied, and store the results, unit by unit."""
    plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
    tiles, projections, part_columns = problem.tiles, problem.projections, problem.part_columns
    filled, consumed = named["filled"], named["consumed"]
    warpgroup = lax.axis_index("warpgroup")

    def multiply_unit(index: Array, step: Array) -> Array:
        unit = _unit(problem, index, named)
        unit = unit._replace(column=unit.column + warpgroup * part_columns)
        _copy_vectors(problem, unit, warpgroup, named)

        def accumulate(accumulator: Ref) -> Array:
            def multiply_step(_, step: Array) -> Array:
                slot = lax.rem(step, tiles.stages)
                plgpu.barrier_wait(filled.at[slot])
                plgpu.wgmma(
                    accumulator,
                    named["weights_smem"].at[slot, warpgroup],
                    named["rows_smem"].at[slot].transpose((1, 0)),
                )
                # Waiting for this very product, not for the one before it, frees its memory a step earlier: more of it is
                # being filled at any time, and that is what limits the speed.
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[slot])
                return step + 1

            lax.fori_loop(unit.first_step, unit.last_step, multiply_step, step)
            return accumulator[...]

        accumulated = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((projections * part_columns, tiles.rows)))
        _finish(problem, accumulated, unit, warpgroup, named)
        return step + unit.last_step - unit.first_step

    lax.fori_loop(0, _num_own_units(problem, named["ends"]), multiply_unit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _copy_vectors(problem: _Problem, unit: _Unit, warpgroup: Array, named: dict[str, Ref]) -> None:
    """Start copying what the end of the unit needs: the bias of the warpgroup's columns, and the factors of the rows."""
    if "bias" in named:
        for projection in range(problem.projections):
            source = named["bias"].at[
                unit.group * problem.projections + projection, pl.ds(unit.column, problem.part_columns)
            ]
            destination = named["bias_smem"].at[warpgroup, projection]
            plgpu.copy_gmem_to_smem(source, destination, named["vectors_filled"].at[warpgroup])
    if "row_scale" in named:
        source = named["row_scale"].at[pl.ds(unit.row, problem.tiles.rows)]
        destination = named["row_scale_smem"].at[warpgroup, pl.ds(0, problem.tiles.rows)]
        plgpu.copy_gmem_to_smem(source, destination, named["vectors_filled"].at[warpgroup])


def _finish(
    problem: _Problem,
    accumulated: Float[Array, "P*columns rows"],
    unit: _Unit,
    warpgroup: Array,
    named: dict[str, Ref],
) -> None:
    """Bias, activation and scale of a warpgroup's accumulator, or of a part the bias alone, then the stores."""
    part_columns = problem.part_columns
    if "vectors_filled" in named:
        plgpu.barrier_wait(named["vectors_filled"].at[warpgroup])
    values = [accumulated[p * part_columns : (p + 1) * part_columns] for p in range(problem.projections)]
    if "bias" in named:
        for projection in range(problem.projections):
            bias = named["bias_smem"][warpgroup, projection].astype(jnp.float32)
            if not problem.is_whole:
                bias = bias * jnp.asarray(unit.part == 0, jnp.float32)
            values[projection] = values[projection] + bias[:, None]
    if problem.is_whole:
        values = [activate(problem.activation, values)]
    if "row_scale" in named:
        values = [values[0] * named["row_scale_smem"][warpgroup, pl.ds(0, problem.tiles.rows)][None, :]]

    buffers = named["result_smem"].at[warpgroup]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if problem.is_transposed:
        _store_transposed(problem, values, unit, buffers, named["result"])
    else:
        buffers.at[0].transpose((1, 0))[...] = values[0].astype(buffers.dtype)
        plgpu.commit_smem()
        store_rows(
            buffers.at[0], named["result"], row=unit.row, first=0, last=unit.last, column=unit.column, exact_rows=False
        )
    plgpu.commit_smem_to_gmem_group()


def _store_transposed(
    problem: _Problem,
    values: list[Float[Array, "columns rows"]],
    unit: _Unit,
    buffers: Ref,
    destination: Ref,
) -> None:
    """Start copying the columns of `values` that are rows of the unit's group, in pieces of 8, to [results, N, M].

    Copies need contiguous memory, so each piece has a buffer to itself: `buffers` is [results, pieces, columns, 8].
    """
    pieces = [(result, piece) for result in range(problem.results) for piece in range(buffers.shape[1])]
    for result, piece in pieces:
        rows = slice(piece * ROW_ALIGNMENT, (piece + 1) * ROW_ALIGNMENT)
        buffers[result, piece] = values[result][:, rows]
    plgpu.commit_smem()
    for result, piece in pieces:

        @pl.when(piece * ROW_ALIGNMENT < unit.last)
        def _(result=result, piece=piece):
            plgpu.copy_smem_to_gmem(
                buffers.at[result, piece],
                destination.at[
                    unit.part * problem.results + result,
                    pl.ds(unit.column, problem.part_columns),
                    pl.ds(unit.row + piece * ROW_ALIGNMENT, ROW_ALIGNMENT),
                ],
                commit_group=False,
            )
