"""Tile sizes of `stream_kernel.py`: what is legal, what it costs in shared memory, and an analytic default."""

import itertools
import math

from ..device import GpuDevice
from .limits import swizzle_bytes
from .tiles import StreamTiles, with_fitting_stages

WEIGHT_ROWS = 64
"""Rows of weights that one instruction multiplies."""
MOST_ACCUMULATORS = 128
"""Float32 accumulators per thread of a warpgroup that multiplies."""
ALLOCATION_ALIGNMENT = 1024
"""Of each buffer in shared memory."""

STEP_BYTES = 32_768
"""Weights of one step of the pipeline, by default: large enough that barriers cost little, small enough for several stages."""
LEAST_STEPS_OF_A_PART = 4
MOST_STAGES = 12
SECOND_PASS_BYTES = 16 * 2**20
"""What device memory moves in the time of one more small kernel (a few microseconds), which a split contraction needs."""


def multiplying_warpgroups(tiles: StreamTiles) -> int:
    """Warpgroups that share the columns of a tile."""
    return 2 if tiles.columns % (2 * WEIGHT_ROWS) == 0 else 1


def shared_memory_bytes(tiles: StreamTiles, projections: int, itemsize: int, output_itemsize: int | None = None) -> int:
    """What a block needs: the pipeline, results, bias and factors of rows in float32, and barriers.

    Args:
        tiles: tile sizes.
        projections: matrices per group.
        itemsize: of rows and weights.
        output_itemsize: of the result, by default as theirs; parts of a split contraction are float32 whatever it is.
    """
    warpgroups = multiplying_warpgroups(tiles)
    results, result_itemsize = (1, output_itemsize or itemsize) if tiles.splits == 1 else (projections, 4)
    buffers = (
        tiles.stages * tiles.rows * tiles.depth * itemsize,
        tiles.stages * projections * tiles.columns * tiles.depth * itemsize,
        results * tiles.rows * tiles.columns * result_itemsize,
        projections * tiles.columns * 4,
        warpgroups * max(tiles.rows, 32) * 4,
    )
    barriers = 8 * (2 * tiles.stages + warpgroups)
    return sum(_round_up(size, ALLOCATION_ALIGNMENT) for size in (*buffers, barriers))


def check_stream_tiles(
    tiles: StreamTiles,
    projections: int,
    width_in: int,
    itemsize: int,
    device: GpuDevice,
    output_itemsize: int | None = None,
) -> None:
    """Refuse tiles that the kernel cannot use.

    Raises:
        ValueError: says which limit was hit.
    """
    if tiles.rows not in (8, 16, 32, 64):
        raise ValueError(f"rows of a tile must be 8, 16, 32 or 64, got {tiles.rows}")
    if tiles.columns < WEIGHT_ROWS or tiles.columns % WEIGHT_ROWS:
        raise ValueError(f"columns of a tile must be a multiple of {WEIGHT_ROWS}, got {tiles.columns}")
    part_columns = tiles.columns // multiplying_warpgroups(tiles)
    accumulators = projections * part_columns * tiles.rows // 128
    if accumulators > MOST_ACCUMULATORS or part_columns > 256:
        raise ValueError(
            f"a warpgroup computes at most 256 columns with {MOST_ACCUMULATORS} accumulators per thread, got"
            f" {part_columns} columns and {accumulators} accumulators for {projections} projections with {tiles}"
        )
    unit = swizzle_bytes(width_in, itemsize) // itemsize
    if tiles.depth < 1 or tiles.depth % unit:
        raise ValueError(
            f"depth must be a multiple of {unit} for a contracted dimension of {width_in}, got {tiles.depth}"
        )
    steps = -(-width_in // tiles.depth)
    if not 1 <= tiles.splits <= steps:
        raise ValueError(f"splits must be 1 to {steps}, the steps over {width_in} of {tiles.depth}, got {tiles.splits}")
    if tiles.stages < 2:
        raise ValueError(f"at least 2 stages are needed, got {tiles.stages}")
    needed = shared_memory_bytes(tiles, projections, itemsize, output_itemsize)
    if needed > device.shared_memory_bytes:
        raise ValueError(
            f"{tiles} needs {needed} bytes of shared memory for {projections} projections, {device.name} has"
            f" {device.shared_memory_bytes}"
        )


def default_stream_tiles(
    num_rows: int,
    num_groups: int,
    width_in: int,
    width_out: int,
    projections: int,
    itemsize: int,
    device: GpuDevice,
    output_itemsize: int | None = None,
) -> StreamTiles:
    """Tiles for `num_rows` rows that belong to `num_groups` groups at random, from static shapes alone.

    The rows hold a typical group; columns and splits are those of the least `_cost`; stages are as many as fit.

    Args:
        num_rows: rows of all groups, padding left out.
        num_groups: groups of rows.
        width_in: D.
        width_out: N.
        projections: matrices per group.
        itemsize: of rows and weights.
        device: the kernel's.
        output_itemsize: of the result, by default as theirs.

    Raises:
        ValueError: the kernel cannot contract over `width_in`.
    """
    unit = swizzle_bytes(width_in, itemsize) // itemsize
    rows = _tile_rows(num_rows / num_groups)
    tried: list[tuple[float, StreamTiles]] = []
    for weight_rows, splits in itertools.product((256, 128, 64), (1, 2, 3, 4, 6, 8)):
        columns = weight_rows // projections
        depth = _round_up(min(STEP_BYTES // (weight_rows * itemsize), width_in), unit)
        # Wide tiles read the rows less often, which hardly matters if these are few; narrow ones read weights in longer runs.
        too_wide = weight_rows > max(128, 8 * rows)
        # A part of fewer steps than that would be over before the pipeline is full.
        too_short = splits > 1 and splits * LEAST_STEPS_OF_A_PART > -(-width_in // depth)
        if too_wide or too_short or columns < WEIGHT_ROWS:
            continue
        tiles = StreamTiles(rows=rows, columns=columns, depth=depth, stages=MOST_STAGES, splits=splits)
        cost = _cost(tiles, num_rows, num_groups, width_in, width_out, projections, itemsize, device)
        tried.append((cost, tiles))
    best = min(tried, key=lambda cost_and_tiles: cost_and_tiles[0])[1]
    best = with_fitting_stages(
        best, lambda tiles: shared_memory_bytes(tiles, projections, itemsize, output_itemsize), device
    )
    check_stream_tiles(best, projections, width_in, itemsize, device, output_itemsize)
    return best


def _tile_rows(mean_rows: float) -> int:
    """Rows that hold most groups: two standard deviations more than the mean of a random routing.

    Larger groups take several tiles, whose weights the L2 cache serves.
    """
    wanted = mean_rows + 2 * math.sqrt(mean_rows)
    return next((rows for rows in (8, 16, 32) if wanted <= rows), 64)


def _cost(
    tiles: StreamTiles,
    num_rows: int,
    num_groups: int,
    width_in: int,
    width_out: int,
    projections: int,
    itemsize: int,
    device: GpuDevice,
) -> float:
    """Time, counted in the bytes that device memory could deliver to one multiprocessor meanwhile.

    A model of three facts: rows come from the L2 cache, at twice the speed at least; half of the multiprocessors can draw all
    that memory delivers, so that a last wave of fewer units takes half the time of a full one; a split contraction writes and
    reads its parts, and needs a second kernel.
    """
    hit_groups = num_groups * (1 - (1 - 1 / num_groups) ** num_rows)
    row_tiles = math.ceil(max(hit_groups, num_rows / tiles.rows))
    units = row_tiles * -(-width_out // tiles.columns) * tiles.splits
    steps = -(-width_in // tiles.depth)
    unit_width = width_in * -(-steps // tiles.splits) / steps
    unit_bytes = (projections * tiles.columns + tiles.rows / 2) * unit_width * itemsize
    waves, rest = divmod(units, device.multiprocessors)
    cost = unit_bytes * (waves + (max(rest / device.multiprocessors, 0.5) if rest else 0))
    if tiles.splits > 1:
        part_bytes = 4 * row_tiles * tiles.rows * projections * width_out
        cost += (SECOND_PASS_BYTES + 2 * tiles.splits * part_bytes) / device.multiprocessors
    return cost


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
