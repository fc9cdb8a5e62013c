"""How long a tile takes on Hopper, roughly: figures to rank tile sizes by, and for nothing else."""

from ..device import GpuDevice

MULTIPLICATIONS_PER_CYCLE = 2048
"""Of 16-bit numbers, by one Hopper multiprocessor."""
CACHE_BYTES_PER_CYCLE = 5120 / 132
"""Assumed of the L2 cache, for each multiprocessor when all read at once."""
MEMORY_BYTES_PER_CYCLE = 20
"""A multiprocessor's share of 4.8 TB/s at 1.8 GHz."""


def cycles_per_step(rows: int, columns: int, depth: int, itemsize: int) -> float:
    """Of one step of a tile's pipeline: multiplying, or copying the operands from the L2 cache, whichever takes longer."""
    multiply = rows * columns * depth / MULTIPLICATIONS_PER_CYCLE
    copy = (rows + columns) * depth * itemsize / CACHE_BYTES_PER_CYCLE
    return max(multiply, copy)


def most_tiles_of_a_block(num_tiles: float, device: GpuDevice) -> int:
    """Tiles of the busiest block, of one block per multiprocessor: what the others have to wait for."""
    return int(-(-num_tiles // device.multiprocessors))
