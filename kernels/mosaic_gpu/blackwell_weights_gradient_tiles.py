"""Tile sizes of `blackwell_weights_gradient_kernel.py`: what is legal, what it costs in shared memory, and an analytic default."""

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
from .tiles import WeightsGradientTiles, check_shared_memory, with_fitting_stages

DEPTH_MULTIPLE = 64
"""Rows that a warpgroup masks at once."""


def shared_memory_bytes(tiles: WeightsGradientTiles, itemsize: int) -> int:
    """What a block needs: the ring of steps, the buffers of results, and barriers."""
    step = (tiles.out_columns + tiles.in_columns) * tiles.depth * itemsize
    results = RESULT_BUFFERS * tiles.out_columns * SWIZZLE_BYTES
    return tiles.stages * (step + 3 * 8) + results + RESERVED_BYTES


def check_blackwell_weights_gradient_tiles(tiles: WeightsGradientTiles, itemsize: int, device: GpuDevice) -> None:
    """Refuse tiles that the kernel cannot use.

    Raises:
        ValueError: says which limit was hit.
    """
    if tiles.out_columns != TENSOR_MEMORY_LANES:
        raise ValueError(f"out_columns must be {TENSOR_MEMORY_LANES}, got {tiles.out_columns}")
    if tiles.in_columns < 64 or tiles.in_columns % 64:
        raise ValueError(f"in_columns must be a multiple of 64, got {tiles.in_columns}")
    if tiles.depth < 1 or tiles.depth % DEPTH_MULTIPLE:
        raise ValueError(f"depth must be a multiple of {DEPTH_MULTIPLE}, got {tiles.depth}")
    if tiles.stages < 2 or tiles.panel < 1:
        raise ValueError(f"at least 2 stages and 1 tile per panel are needed, got {tiles}")
    accumulators = ACCUMULATORS * tiles.in_columns
    if accumulators > TENSOR_MEMORY_COLUMNS:
        raise ValueError(f"{tiles} needs {accumulators} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}")
    check_shared_memory(tiles, shared_memory_bytes(tiles, itemsize), device)


def default_blackwell_weights_gradient_tiles(
    num_groups: int, width_out: int, width_in: int, itemsize: int, device: GpuDevice
) -> WeightsGradientTiles:
    """Tiles that suit any shape: the widest that still give every multiprocessor a tile, with all stages that fit.

    Args:
        num_groups: G.
        width_out: N, columns of the cotangent.
        width_in: D, columns of the rows.
        itemsize: bytes per element of the operands.
        device: what the kernel runs on.

    Raises:
        ValueError: not even two stages of the narrowest tile fit the device.
    """
    in_columns = min(TENSOR_MEMORY_COLUMNS // ACCUMULATORS, pl.cdiv(width_in, 64) * 64)
    num_out = pl.cdiv(width_out, TENSOR_MEMORY_LANES)
    while in_columns > 64 and num_groups * num_out * pl.cdiv(width_in, in_columns) < device.multiprocessors:
        in_columns = pl.cdiv(in_columns // 2, 64) * 64
    # What all multiprocessors work on at once is about square, which reads least.
    square = max(round((device.multiprocessors * in_columns / TENSOR_MEMORY_LANES) ** 0.5), 1)
    widest = WeightsGradientTiles(
        out_columns=TENSOR_MEMORY_LANES,
        in_columns=in_columns,
        depth=DEPTH_MULTIPLE,
        stages=MOST_STAGES,
        panel=min(square, num_out),
    )
    tiles = with_fitting_stages(widest, lambda tiles: shared_memory_bytes(tiles, itemsize), device)
    check_blackwell_weights_gradient_tiles(tiles, itemsize, device)
    return tiles
