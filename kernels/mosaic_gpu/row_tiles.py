"""Tile sizes of `rows_kernel.py`: what is legal, what it costs in shared memory, and an analytic default."""

import dataclasses

from ..device import GpuDevice
from .cost_model import cycles_per_step, most_tiles_of_a_block
from .limits import SWIZZLES
from .tiles import RowTiles, check_shared_memory, with_fitting_stages

WARPGROUPS = 2
"""Those that multiply."""
WARPGROUP_ROWS = 64
"""Rows that one instruction multiplies."""
MOST_STAGES = 6
"""More hide no more latency."""
LEAST_GAIN = 0.05
"""Share of the time by which smaller tiles must be ahead: they read more for what they multiply, and the times are rough."""


def column_parts_of(tiles: RowTiles) -> int:
    """Parts into which the columns are split: the warpgroups share 64 rows, or take 64 of 128 rows each."""
    return WARPGROUPS * WARPGROUP_ROWS // tiles.rows


def part_columns_of(tiles: RowTiles) -> int:
    """Columns that a warpgroup computes, of gate and of up each."""
    return tiles.columns // column_parts_of(tiles)


def shared_memory_bytes(tiles: RowTiles, projections: int, itemsize: int) -> int:
    """What a block needs: the pipeline, two chunks of results for each warpgroup, its biases in float32, and barriers."""
    step = (tiles.rows + projections * tiles.columns) * tiles.depth * itemsize
    results = WARPGROUPS * 2 * WARPGROUP_ROWS * SWIZZLES[0]
    biases = WARPGROUPS * projections * part_columns_of(tiles) * 4
    return tiles.stages * (step + 2 * 8) + results + biases + WARPGROUPS * 8


def check_row_tiles(tiles: RowTiles, projections: int, itemsize: int, device: GpuDevice) -> None:
    """Refuse tiles that the kernel cannot use.

    Raises:
        ValueError: says which limit was hit.
    """
    if tiles.rows not in (64, 128):
        raise ValueError(f"rows of a tile must be 64 or 128, got {tiles.rows}")
    part = tiles.columns / column_parts_of(tiles)
    if part < 64 or part % 64 or projections * part > 256:
        raise ValueError(
            f"columns per warpgroup must be a multiple of 64 with at most {256 // projections} for {projections}"
            f" projections, got {part:g} of {tiles}"
        )
    if tiles.depth < 1 or tiles.depth * itemsize % SWIZZLES[0]:
        raise ValueError(f"depth must be a multiple of {SWIZZLES[0] // itemsize}, got {tiles.depth}")
    if tiles.stages < 2 or tiles.panel < 1:
        raise ValueError(f"at least 2 stages and 1 tile per panel are needed, got {tiles}")
    check_shared_memory(tiles, shared_memory_bytes(tiles, projections, itemsize), device)


def default_row_tiles(
    num_rows: int, num_groups: int, width_out: int, projections: int, itemsize: int, device: GpuDevice
) -> RowTiles:
    """Tiles that suit any shape, from static shapes alone: as many stages as shared memory holds.

    - 128 rows as soon as groups have 64 on average: a tile with no more than 64 rows is computed by one warpgroup, in half the
      time.
    - Columns as many as the registers hold. They are halved where a whole tile would be mostly empty, and where the busiest
      block is done clearly earlier with tiles of half the size: when there are few of them, the last wave counts.
    """
    tiles = RowTiles(
        rows=128 if num_rows >= WARPGROUP_ROWS * num_groups else 64,
        columns=256 // projections,
        depth=SWIZZLES[0] // itemsize,
        stages=MOST_STAGES,
        panel=16,
    )

    def cycles(columns: int) -> float:
        row_tiles = _row_tiles(num_rows, num_groups, tiles.rows)
        most = most_tiles_of_a_block(row_tiles * -(-width_out // columns), device)
        return most * cycles_per_step(tiles.rows, projections * columns, tiles.depth, itemsize)

    least_columns = 64 * column_parts_of(tiles)
    while (half := tiles.columns // 2) >= least_columns:
        if half < width_out and cycles(half) > (1 - LEAST_GAIN) * cycles(tiles.columns):
            break
        tiles = dataclasses.replace(tiles, columns=half)
    return with_fitting_stages(tiles, lambda tiles: shared_memory_bytes(tiles, projections, itemsize), device)


def _row_tiles(num_rows: int, num_groups: int, tile_rows: int) -> float:
    """Tiles of rows of groups at random: the last one of a group is half full, and a group that has rows has at least one."""
    hit_groups = num_groups * (1 - (1 - 1 / max(num_groups, 1)) ** num_rows)
    return max(hit_groups, num_rows / tile_rows + num_groups / 2)
