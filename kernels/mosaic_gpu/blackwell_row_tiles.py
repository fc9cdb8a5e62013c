"""Tile sizes of `blackwell_rows_kernel.py`: what is legal, what it costs in shared memory, and an analytic default."""

from jax.experimental import pallas as pl

from ..device import GpuDevice
from .blackwell_memory import (
    ACCUMULATORS,
    MOST_STAGES,
    RESERVED_BYTES,
    RESULT_BUFFERS,
    SWIZZLE_BYTES,
    TENSOR_MEMORY_COLUMNS,
    TENSOR_MEMORY_LANES,
)
from .tiles import RowTiles, check_shared_memory, with_fitting_stages

MOST_PANEL_TILES = 64


def shared_memory_bytes(tiles: RowTiles, projections: int, itemsize: int) -> int:
    """The most that a block needs: the ring of steps, the buffers of results, and barriers."""
    step = (tiles.rows + projections * tiles.columns) * tiles.depth * itemsize
    results = RESULT_BUFFERS * tiles.rows * SWIZZLE_BYTES
    return tiles.stages * (step + 2 * 8) + results + RESERVED_BYTES


def check_blackwell_row_tiles(tiles: RowTiles, projections: int, itemsize: int, device: GpuDevice) -> None:
    """Refuse tiles that the kernel cannot use.

    Raises:
        ValueError: says which limit was hit.
    """
    if tiles.rows != TENSOR_MEMORY_LANES:
        raise ValueError(f"rows of a tile must be {TENSOR_MEMORY_LANES}, got {tiles.rows}")
    if tiles.columns < 64 or tiles.columns % 64:
        raise ValueError(f"columns of a tile must be a multiple of 64, got {tiles.columns}")
    if tiles.depth < 1 or tiles.depth * itemsize % SWIZZLE_BYTES:
        raise ValueError(f"depth must be a multiple of {SWIZZLE_BYTES // itemsize}, got {tiles.depth}")
    if tiles.stages < 2 or tiles.panel < 1:
        raise ValueError(f"at least 2 stages and 1 tile per panel are needed, got {tiles}")
    accumulators = ACCUMULATORS * projections * tiles.columns
    if accumulators > TENSOR_MEMORY_COLUMNS:
        raise ValueError(
            f"{tiles} with {projections} projections needs {accumulators} columns of tensor memory,"
            f" there are {TENSOR_MEMORY_COLUMNS}"
        )
    check_shared_memory(tiles, shared_memory_bytes(tiles, projections, itemsize), device)


def default_blackwell_row_tiles(
    num_rows: int,
    num_groups: int,
    width_in: int,
    width_out: int,
    projections: int,
    itemsize: int,
    device: GpuDevice,
) -> RowTiles:
    """Tiles that suit any shape: the widest that still give every multiprocessor a tile, with all stages that fit.

    Args:
        num_rows: M, rows of all groups.
        num_groups: G.
        width_in: contracted width.
        width_out: columns of the result.
        projections: 2 for gate and up, otherwise 1.
        itemsize: bytes per element of rows and weights.
        device: what the kernel runs on.

    Raises:
        ValueError: not even two stages of the narrowest tile fit the device.
    """
    columns = min(TENSOR_MEMORY_COLUMNS // (ACCUMULATORS * projections), pl.cdiv(width_out, 64) * 64)
    row_tiles = pl.cdiv(num_rows, TENSOR_MEMORY_LANES) + min(num_groups, num_rows) // 2
    while columns > 64 and row_tiles * pl.cdiv(width_out, columns) < device.multiprocessors:
        columns = pl.cdiv(columns // 2, 64) * 64
    # The rows of a panel are read again for each tile of columns, and stay in the cache next to the weights that stream by.
    panel = device.l2_bytes // 4 // (TENSOR_MEMORY_LANES * width_in * itemsize)
    widest = RowTiles(
        rows=TENSOR_MEMORY_LANES,
        columns=columns,
        depth=SWIZZLE_BYTES // itemsize,
        stages=MOST_STAGES,
        panel=min(max(panel, 1), MOST_PANEL_TILES),
    )
    tiles = with_fitting_stages(widest, lambda tiles: shared_memory_bytes(tiles, projections, itemsize), device)
    check_blackwell_row_tiles(tiles, projections, itemsize, device)
    return tiles
