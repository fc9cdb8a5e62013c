"""Few rows times the matrix of their group: the kernel for decoding, which reads memory and does little else.

The kernel on many rows (`rows_kernel.py`) reads a large block of weights ahead of the one that it multiplies, a column of blocks
after the other, and multiplies as many rows as a matrix unit has. Here a visit stays until all columns of its group are done: its
rows are read once, and its result is stored once. Weights come through a ring of small blocks, several of them on their way at
any time, across the ends of groups; only the last, small one is multiplied while nothing is read. Sixteen rows are multiplied
as sixteen. What is read of the weights is what the groups with rows have, each once.

By the compiler's static schedule, bytes of bfloat16 weights that one instruction bundle gets multiplied, by 16, 32 and 128 rows:
3862, 3712 and 2224 on v6e, 2804, 2509 and 1093 on v5e, 2853, 2962 and 2447 on 7x. No measurement, but several times what memory
delivers per cycle, so that how long the kernel takes is decided by how much of the weights is on its way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float

from ..activations import Activation
from ..device import TpuDevice
from ..varying import shape_varying_like
from .epilogue import activate
from .limits import LANES, compiler_vmem_limit_bytes
from .schedule import ROW_ALIGNMENT, VisitTable
from .shared_rows import mask_ends, whole_rows
from .stream_tiles import StreamShape, StreamTiles, check_stream_tiles

Ref = Any
STRIP = 256
"""Columns that are multiplied and activated at once, if a block's are a multiple of it."""


def stream_weights(
    rows: Float[Array, "M Dpadded"],
    weights: Float[Array, "G P N D"],
    table: VisitTable,
    *,
    tiles: StreamTiles,
    bias: Float[Array, "G P N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    output_dtype: DTypeLike,
    device: TpuDevice,
) -> Float[Array, "M Npadded"]:
    """row_scale * activation(rows @ matrices.T + bias) for the rows of every visit, accumulated in float32.

    Args:
        rows: bfloat16 or float32; M is a multiple of 16. Columns from D on are not looked at: padding of a result before it.
        weights: of the same dtype, (out, in) matrices; N is a multiple of 16.
        table: the visits to groups with rows, made with `tiles.rows`, and neither `zero_outside` nor `visit_empty`.
        tiles: see `StreamTiles`.
        bias: added to each projection in float32.
        activation: of the P projections (2: gate and up); None if there is one projection, which is then the result.
        row_scale: float32 factor of each row of the result.
        output_dtype: bfloat16 or float32.
        device: what the kernel runs on.

    Returns:
        The result, its columns padded to a multiple of 128, of which those from N on hold anything. Rows that no visit writes
        hold anything; rows of no group among 16 of which a group has some are zeros.

    Raises:
        ValueError: sizes that copies cannot address; tiles that don't fit the shape or the device; an activation of another
            number of projections.
    """
    num_rows, padded_in = rows.shape
    _, projections, width_out, width_in = weights.shape
    output_dtype = jnp.dtype(output_dtype)
    shape = StreamShape(
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        itemsize=rows.dtype.itemsize,
        output_itemsize=output_dtype.itemsize,
    )
    check_stream_tiles(tiles, shape, device)
    expected = 2 if activation is not None and activation.is_gated else 1
    if projections != expected:
        raise ValueError(f"activation {activation} is a function of {expected} projections, got {projections}")
    blocks, num_cores = shape.blocks_per_core(tiles, device), shape.num_cores(tiles, device)
    padded_out = pl.cdiv(width_out, LANES) * LANES
    problem = _Problem(tiles, projections, activation, width_in, width_out, padded_out, blocks, num_cores)

    operands, buffers = {"rows": rows, "weights": weights}, {}
    buffers["rows_buffer"] = pltpu.VMEM((2, tiles.rows, padded_in), rows.dtype)
    buffers["weights_buffer"] = pltpu.VMEM((tiles.slots, projections, tiles.columns, width_in), weights.dtype)
    if bias is not None:
        width = num_cores * problem.core_columns
        operands["bias"] = jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, 0), (0, width - width_out)))
        buffers["bias_buffer"] = pltpu.VMEM((2, projections, width), jnp.float32)
    if row_scale is not None:
        # A factor per row along lanes: a few rows' are nothing beside the weights.
        operands["row_scale"] = jnp.broadcast_to(row_scale.astype(jnp.float32)[:, None], (num_rows, LANES))
        buffers["scale_buffer"] = pltpu.VMEM((2, tiles.rows, LANES), jnp.float32)
    buffers["result_buffer"] = pltpu.VMEM((2, tiles.rows, problem.core_columns), output_dtype)
    buffers["shared_rows"] = pltpu.VMEM((ROW_ALIGNMENT, problem.core_columns), output_dtype)
    buffers["weights_fetched"] = pltpu.SemaphoreType.DMA((tiles.slots,))
    buffers["rows_fetched"] = pltpu.SemaphoreType.DMA((2,))
    buffers["stored"] = pltpu.SemaphoreType.DMA((2,))
    names = (*operands, "result", *buffers)

    def streamed_weights(*refs: Ref) -> None:
        _Kernel(problem, VisitTable(*refs[: len(table)]), dict(zip(names, refs[len(table) :], strict=True))).run()

    return pl.pallas_call(
        streamed_weights,
        out_shape=shape_varying_like((num_rows, padded_out), output_dtype, rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(num_cores,),
            in_specs=tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in operands),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=tuple(buffers.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=compiler_vmem_limit_bytes(device)
        ),
        name="streamed_weights",
    )(*table, *operands.values())


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is static in the body of the kernel."""

    tiles: StreamTiles
    projections: int
    activation: Activation | None
    width_in: int
    width_out: int
    padded_out: int
    blocks: int
    """Of a group's weights, for each core."""
    cores: int

    @property
    def core_columns(self) -> int:
        """Columns of the result that a core computes, the last one's beyond `padded_out` included."""
        return self.blocks * self.tiles.columns


class _Kernel:
    """The body of the kernel, for one core: a loop over visits, in it one over blocks of the group's weights."""

    def __init__(self, problem: _Problem, table: VisitTable, refs: dict[str, Ref]) -> None:
        self._problem, self._table, self._refs = problem, table, refs
        self._core = pl.program_id(0)
        self._count = table.count[0]

    def run(self) -> None:
        """Compute all visits."""
        problem, table, count = self._problem, self._table, self._count
        shared_rows = self._refs["shared_rows"]
        shared_rows[...] = jnp.zeros_like(shared_rows)

        @pl.loop(0, jnp.minimum(problem.tiles.slots, count * problem.blocks))
        def _(unit):
            self._weights_copies(unit, lambda copy: copy.start())

        @pl.when(count > 0)
        def _():
            self._rows_copies(0, lambda copy: copy.start())

        @pl.loop(0, count)
        def _(visit):
            @pl.when(visit + 1 < count)
            def _():
                self._rows_copies(visit + 1, lambda copy: copy.start())

            @pl.when(visit > 1)
            def _():
                self._store_copies(visit - 2, lambda copy: copy.wait())

            self._rows_copies(visit, lambda copy: copy.wait())
            lower = 0
            for size in problem.tiles.sizes:

                @pl.when((table.last[visit] > lower) & (table.last[visit] <= size))
                def _(size=size):
                    @pl.loop(0, problem.blocks)
                    def _(block):
                        self._multiply(visit, block, size)

                lower = size
            mask_ends(
                self._refs["result_buffer"].at[lax.rem(visit, 2)], shared_rows, table.first[visit], table.last[visit]
            )
            self._store_copies(visit, lambda copy: copy.start())

        @pl.loop(jnp.maximum(count - 2, 0), count)
        def _(visit):
            self._store_copies(visit, lambda copy: copy.wait())

    def _multiply(self, visit: Array, block: Array, size: int) -> None:
        """The columns of one block, for `size` rows; then its slot is filled anew."""
        problem, refs = self._problem, self._refs
        tiles = problem.tiles
        unit = visit * problem.blocks + block
        slot, visit_slot = lax.rem(unit, tiles.slots), lax.rem(visit, 2)
        self._weights_copies(unit, lambda copy: copy.wait())
        rows = refs["rows_buffer"][visit_slot, :size, : problem.width_in]
        # One pass of a matrix unit rounds float32 operands to bfloat16.
        precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else lax.Precision.DEFAULT
        strip = STRIP if tiles.columns % STRIP == 0 else LANES
        for start in range(0, tiles.columns, strip):
            column = pl.multiple_of(block * tiles.columns + start, LANES)
            projected = []
            for projection in range(problem.projections):
                values = lax.dot_general(
                    rows,
                    refs["weights_buffer"][slot, projection, start : start + strip, :],
                    (((1,), (1,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                if "bias" in refs:
                    first = pl.multiple_of(self._core * problem.core_columns + column, LANES)
                    values = values + refs["bias_buffer"][visit_slot, projection, pl.ds(first, strip)][None, :]
                projected.append(values)
            values = activate(problem.activation, projected)
            if "row_scale" in refs:
                values = values * refs["scale_buffer"][visit_slot, :size, :1]
            result_buffer = refs["result_buffer"]
            result_buffer[visit_slot, :size, pl.ds(column, strip)] = values.astype(result_buffer.dtype)

        @pl.when(unit + tiles.slots < self._count * problem.blocks)
        def _():
            self._weights_copies(unit + tiles.slots, lambda copy: copy.start())

    def _weights_copies(self, unit: Array, act: Callable[[Any], None]) -> None:
        """The copy of the `unit`-th block of all visits: a group's last may have fewer columns, and the last core's none."""
        problem, refs = self._problem, self._refs
        columns = problem.tiles.columns
        slot = lax.rem(unit, problem.tiles.slots)
        matrix = self._table.matrix(lax.div(unit, problem.blocks))
        block = self._core * problem.blocks + lax.rem(unit, problem.blocks)

        def copy(width: int) -> None:
            own_columns = pl.ds(pl.multiple_of(block * columns, LANES), width)
            target = refs["weights_buffer"].at[slot, :, pl.ds(0, width)]
            source = refs["weights"].at[matrix, :, own_columns]
            act(pltpu.make_async_copy(source, target, refs["weights_fetched"].at[slot]))

        _split_last(block, pl.cdiv(problem.width_out, columns), columns, problem.width_out, copy)

    def _rows_copies(self, visit: Array | int, act: Callable[[Any], None]) -> None:
        """The copies of a visit's rows, their factors, and its group's bias."""
        table, refs = self._table, self._refs
        slot = lax.rem(visit, 2)
        size = whole_rows(table.last[visit])
        own_rows = pl.ds(pl.multiple_of(table.source[visit], ROW_ALIGNMENT), size)
        semaphore = refs["rows_fetched"].at[slot]
        act(pltpu.make_async_copy(refs["rows"].at[own_rows], refs["rows_buffer"].at[slot, pl.ds(0, size)], semaphore))
        if "row_scale" in refs:
            target = refs["scale_buffer"].at[slot, pl.ds(0, size)]
            act(pltpu.make_async_copy(refs["row_scale"].at[own_rows], target, semaphore))
        if "bias" in refs:
            source = refs["bias"].at[table.group[visit]]
            act(pltpu.make_async_copy(source, refs["bias_buffer"].at[slot], semaphore))

    def _store_copies(self, visit: Array, act: Callable[[Any], None]) -> None:
        """The copy of a visit's result to device memory, if it is the one to write its rows."""
        problem, table, refs = self._problem, self._table, self._refs
        slot = lax.rem(visit, 2)
        size = pl.multiple_of(table.stored[visit], ROW_ALIGNMENT)
        own_rows = pl.ds(pl.multiple_of(table.row[visit], ROW_ALIGNMENT), size)

        def copy(width: int) -> None:
            own_columns = pl.ds(pl.multiple_of(self._core * problem.core_columns, LANES), width)
            source = refs["result_buffer"].at[slot, pl.ds(0, size), pl.ds(0, width)]
            act(pltpu.make_async_copy(source, refs["result"].at[own_rows, own_columns], refs["stored"].at[slot]))

        @pl.when(size > 0)
        def _():
            _split_last(self._core, problem.cores, problem.core_columns, problem.padded_out, copy)


def _split_last(index: Array, number: int, part: int, whole: int, act: Callable[[int], None]) -> None:
    """Call with the size of the `index`-th of the `number` parts of `whole`, of which the last may be smaller, if there is one."""
    last_part = whole - (number - 1) * part

    @pl.when(index < number - 1)
    def _():
        act(part)

    @pl.when(index == number - 1)
    def _():
        act(last_part)
