"""Tile sizes of `weights_gradient_kernel.py`: what is legal, what it costs in shared memory, and an analytic default."""

import dataclasses
import math

from jax.experimental import pallas as pl

from ..device import GpuDevice
from .cost_model import MEMORY_BYTES_PER_CYCLE, cycles_per_step, most_tiles_of_a_block
from .limits import SWIZZLES
from .tiles import WeightsGradientTiles, check_shared_memory

CONSUMERS = 2
"""Warpgroups that multiply."""
CHUNK_ROWS = 64
"""Output is stored in chunks of so many rows, as wide as its swizzle."""
CHUNK_BYTES = CHUNK_ROWS * SWIZZLES[0]
LEGAL_OUT_COLUMNS, LEGAL_IN_COLUMNS = (128, 256), (64, 128, 192, 256)
LEGAL_DEPTHS = (64,)
"""wgmma as Mosaic GPU emits it takes multiples of 64 when the contracted dimension comes first; more only costs padding."""
MOST_TILE_ELEMENTS = 128 * 256
"""128 registers of accumulator for each thread; with 192 the kernel spills for some shapes and stages."""

CANDIDATE_SIZES = ((128, 256), (256, 128), (128, 128))
"""(out_columns, in_columns) that the default chooses from; the first of equally good ones."""
FEWEST_STAGES, MOST_STAGES = 3, 6
"""Of the default."""


def shared_memory_bytes(tiles: WeightsGradientTiles, itemsize: int, output_itemsize: int, device: GpuDevice) -> int:
    """Shared memory of a block: slots for the operands, staging of the output, barriers.

    Raises:
        ValueError: it would be more than the device has, or the kernel has no such tiles.
    """
    staging = staged_chunks(tiles, itemsize, output_itemsize, device) * CONSUMERS * CHUNK_BYTES
    return _operand_bytes(tiles, itemsize) + staging


def check_weights_gradient_tiles(tiles: WeightsGradientTiles, itemsize: int, device: GpuDevice) -> None:
    """Refuse tiles that the kernel cannot use.

    Raises:
        ValueError: says which limit was hit.
    """
    for name, legal in (
        ("out_columns", LEGAL_OUT_COLUMNS),
        ("in_columns", LEGAL_IN_COLUMNS),
        ("depth", LEGAL_DEPTHS),
    ):
        if getattr(tiles, name) not in legal:
            raise ValueError(f"{name} must be one of {legal}, got {tiles}")
    if tiles.out_columns * tiles.in_columns > MOST_TILE_ELEMENTS:
        raise ValueError(f"out_columns * in_columns must be at most {MOST_TILE_ELEMENTS}, got {tiles}")
    if tiles.stages < 2 or tiles.panel < 1:
        raise ValueError(f"stages must be at least 2 and panel at least 1, got {tiles}")
    check_shared_memory(tiles, _operand_bytes(tiles, itemsize) + CONSUMERS * CHUNK_BYTES, device)


def staged_chunks(tiles: WeightsGradientTiles, itemsize: int, output_itemsize: int, device: GpuDevice) -> int:
    """How many chunks of its output a consumer stages at once: as many as fit and divide their number.

    A divisor, so that chunk c of every tile has the same place, and that place is free when the chunk as many before is stored.

    Raises:
        ValueError: the kernel has no such tiles, see `check_weights_gradient_tiles`.
    """
    check_weights_gradient_tiles(tiles, itemsize, device)
    num_chunks = _num_chunks(tiles, output_itemsize)
    fitting = min(num_chunks, _most_staged_chunks(tiles, itemsize, device))
    return max(staged for staged in range(1, fitting + 1) if num_chunks % staged == 0)


def default_weights_gradient_tiles(
    num_rows: int,
    num_groups: int,
    width_out: int,
    width_in: int,
    itemsize: int,
    output_itemsize: int,
    device: GpuDevice,
) -> WeightsGradientTiles:
    """Tile sizes from static shapes alone, for groups of about equal size.

    - The tile is the one with which the busiest block is done first: it counts the block's tiles, each at the time that
      multiplying or copying its operands takes, whichever is longer.
    - The panel is as near as can be to a square of what all blocks work on at once, which reads least from memory; panels
      of a group are equally high.
    - Storing a tile takes as long as several steps of multiplication. When groups have few steps, all of the output is
      staged if it fits, so that it is stored behind the next tile's multiplication, or else as much as fits beside three
      stages of the operands. Otherwise the operands have as many stages as leave room for staging two chunks.

    Args:
        num_rows: M.
        num_groups: G.
        width_out: N.
        width_in: D.
        itemsize: bytes per element of the operands.
        output_itemsize: bytes per element of the gradient.
        device: see `GpuDevice`.
    """
    depth = LEGAL_DEPTHS[0]

    def cycles(size: tuple[int, int]) -> float:
        num_tiles = num_groups * pl.cdiv(width_out, size[0]) * pl.cdiv(width_in, size[1])
        return most_tiles_of_a_block(num_tiles, device) * cycles_per_step(*size, depth, itemsize)

    size = min(CANDIDATE_SIZES, key=cycles)
    out_columns, in_columns = size
    num_out = pl.cdiv(width_out, out_columns)
    square = round(math.sqrt(device.multiprocessors * in_columns / out_columns))
    panel = pl.cdiv(num_out, pl.cdiv(num_out, max(square, 1)))

    smallest = WeightsGradientTiles(
        out_columns=out_columns, in_columns=in_columns, depth=depth, stages=FEWEST_STAGES, panel=panel
    )
    mean_steps = max(num_rows / max(num_groups, 1) / depth, 1)
    store_cycles = out_columns * in_columns * output_itemsize / MEMORY_BYTES_PER_CYCLE
    few_steps = mean_steps * cycles_per_step(*size, depth, itemsize) < 2 * store_cycles

    roomy = [
        tiles
        for stages in range(MOST_STAGES, FEWEST_STAGES - 1, -1)
        if _most_staged_chunks(tiles := dataclasses.replace(smallest, stages=stages), itemsize, device) >= 2
    ]
    if not few_steps:
        return roomy[0]
    num_chunks = _num_chunks(smallest, output_itemsize)
    return next((tiles for tiles in roomy if _most_staged_chunks(tiles, itemsize, device) >= num_chunks), smallest)


def _operand_bytes(tiles: WeightsGradientTiles, itemsize: int) -> int:
    """Slots of the operands, and two barriers for each and one for masking."""
    return tiles.stages * tiles.depth * (tiles.out_columns + tiles.in_columns) * itemsize + (2 * tiles.stages + 1) * 8


def _num_chunks(tiles: WeightsGradientTiles, output_itemsize: int) -> int:
    """Chunks of one consumer's output."""
    return tiles.out_columns // CONSUMERS * tiles.in_columns * output_itemsize // CHUNK_BYTES


def _most_staged_chunks(tiles: WeightsGradientTiles, itemsize: int, device: GpuDevice) -> int:
    """Chunks of each consumer's output that fit beside the operands."""
    return (device.shared_memory_bytes - _operand_bytes(tiles, itemsize)) // (CONSUMERS * CHUNK_BYTES)
