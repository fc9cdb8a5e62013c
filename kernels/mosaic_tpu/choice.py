"""Which tiles compute a grouped matmul on a TPU, and why: from static shapes alone.

The tiles are those with the least estimated time, of all that fit into vector memory: that of products and of copies, which
overlap, and what every visit and every pass over the columns costs besides.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..device import TpuDevice
from .limits import LANES, rows_vmem_bytes, vmem_limit_bytes
from .rounding import round_up
from .schedule import ROW_ALIGNMENT
from .stream_tiles import StreamShape, StreamTiles, default_stream_tiles
from .tiles import RowTiles

STREAM_MOST_MEAN_ROWS = 32
"""Up to so many rows per group on average, weights are streamed past the rows; beyond, rows are tiled."""

SECONDS_PER_VISIT = 0.4e-6
"""Estimate of what a visit costs besides products: some hundred instructions, in which nothing is multiplied."""

PRODUCT_ROWS = {"v5e": (4, 28), "v5p": (4, 28), "v6e": (15, 122), "7x": (155, 260)}
"""What multiplying some rows at once takes, in the time of one of many rows: so many more than the rows there are, and at least so
many and 0.6 for each row, since weights have to be loaded into matrix units. Read from compiled kernels with 64 to 1024 rows."""

POPULAR_SHARE, POPULAR_ROWS = 1 / 8, 4
"""So many of the groups are taken to have so many times the mean of rows, half of all: routers have favourites."""

OVERLAP_EXPONENT = 4
"""Products and copies together are taken for the root of the sum of such powers of both: the longer of them, if it is by far, and
a fifth more if they are equal, because neither hides the other all the time."""

LEAST_SAVED_BY_GROUP = 0.02
"""Share of the bytes that computing several tiles of columns group by group must save, because it takes tables of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsProblem:
    """Static sizes of a grouped matmul."""

    num_rows: int
    """Of all groups: about as many as there will be, not what there is room for."""
    num_groups: int
    width_in: int
    """The dimension that is contracted."""
    width_out: int
    """Columns of the result, of gate and of up each."""
    projections: int
    """Matrices per group: 2 (gate and up) or 1."""
    kept: bool = False
    """Whether the projections are stored too."""
    scaled_rows: int = 0
    """Rows of the array of factors, if rows of the result are scaled."""
    itemsize: int
    """Bytes of an operand's element."""
    output_itemsize: int
    """Bytes of a result's element."""

    def __str__(self) -> str:
        gated = "gate and up of " if self.projections == 2 else ""
        return f"{self.num_rows} rows in {self.num_groups} groups, {gated}{self.width_in} -> {self.width_out}"


@dataclasses.dataclass(frozen=True)
class ChosenTiles:
    """Tile sizes, and where they come from."""

    tiles: Any
    """Of the kind that the kernel takes."""
    reason: str


def streams_weights(problem: RowsProblem) -> bool:
    """Whether the rows per group are so few that weights should be streamed past them, and their width allows it."""
    return problem.num_rows <= STREAM_MOST_MEAN_ROWS * problem.num_groups and problem.width_out % ROW_ALIGNMENT == 0


def choose_stream_tiles(problem: RowsProblem, device: TpuDevice) -> ChosenTiles:
    """The tiles of the kernel that streams weights, for these sizes."""
    shape = StreamShape(
        width_in=problem.width_in,
        width_out=problem.width_out,
        projections=problem.projections,
        itemsize=problem.itemsize,
        output_itemsize=problem.output_itemsize,
    )
    tiles: StreamTiles = default_stream_tiles(problem.num_rows, shape, device)
    return ChosenTiles(
        tiles, f"analytic default for {problem} on {device.name}: few rows per group, bound by reading weights"
    )


def choose_row_tiles(problem: RowsProblem, device: TpuDevice) -> ChosenTiles:
    """The tiles for these sizes.

    Raises:
        ValueError: no tiles fit into vector memory, because a row is too long.
    """
    candidates = list(_candidates(problem, device))
    fitting = _fitting(candidates, problem, device)
    if not fitting:
        raise ValueError(row_too_long(problem, device))
    tiles = _best(fitting, problem, device)
    by_group = _fitting(_by_group(candidates, tiles, problem, device), problem, device)
    if by_group:
        fitting += by_group
        best = _best([tiles, *by_group], problem, device)
        saved = 1 - _copy_seconds(best, problem, device) / _copy_seconds(tiles, problem, device)
        tiles = best if saved >= LEAST_SAVED_BY_GROUP else tiles
    used = _vmem_bytes(tiles, problem, device) / 2**20
    bound = "products" if _product_seconds(tiles, problem, device) > _copy_seconds(tiles, problem, device) else "copies"
    reason = (
        f"least estimated time of {len(fitting)} tilings for {problem} on {device.name}: bound by {bound},"
        f" {used:.0f} of {vmem_limit_bytes(device) / 2**20:.0f} MiB of vector memory"
    )
    return ChosenTiles(tiles, reason)


def _fitting(candidates: Iterable[RowTiles], problem: RowsProblem, device: TpuDevice) -> list[RowTiles]:
    return [tiles for tiles in candidates if _vmem_bytes(tiles, problem, device) <= vmem_limit_bytes(device)]


def _best(fitting: Sequence[RowTiles], problem: RowsProblem, device: TpuDevice) -> RowTiles:
    return min(fitting, key=lambda tiles: _estimated_seconds(tiles, problem, device))


def row_too_long(problem: RowsProblem, device: TpuDevice) -> str | None:
    """Why no tiles fit into vector memory, or None if some do."""
    smallest = _vmem_bytes(_tiles(LANES, LANES, LANES, problem, device), problem, device)
    if smallest <= vmem_limit_bytes(device):
        return None
    return (
        f"{LANES} rows and {LANES} columns of {problem.width_in} elements take {smallest} bytes of vector memory,"
        f" {device.name} has {vmem_limit_bytes(device)} to give"
    )


def _candidates(problem: RowsProblem, device: TpuDevice) -> Iterator[RowTiles]:
    """Doubled rows, and columns that cut the result into equal parts."""
    widest = round_up(problem.width_out, LANES)
    columns = {LANES}
    for parts in range(1, math.ceil(widest / LANES) + 1):
        width = math.ceil(problem.width_out / parts)
        columns |= {round_up(width, LANES), min(round_up(width, 256), widest)}
    chunks = {LANES, device.mxu_size}
    more_rows, _ = PRODUCT_ROWS[device.name]
    if more_rows > device.mxu_size / 4:  # so much that multiplying more rows at once is worth more code
        chunks |= {2 * device.mxu_size}
    for chunk in sorted(chunks):
        rows = [chunk * 2**power for power in range(5) if power == 0 or chunk * 2 ** (power - 1) < problem.num_rows]
        for tile_rows in rows:
            for tile_columns in sorted(columns):
                yield _tiles(chunk, tile_rows, tile_columns, problem, device)


def _by_group(
    candidates: Iterable[RowTiles], best: RowTiles, problem: RowsProblem, device: TpuDevice
) -> Iterator[RowTiles]:
    """The same tiles with one pass for each core, as far as their number allows it; none if it could gain little.

    Where gate and up do not fit into vector memory whole, or cores share the columns, each pass has few columns for all the rows.
    That matters unless copies hide behind products that take far longer.
    """
    hidden = _copy_seconds(best, problem, device) < _product_seconds(best, problem, device) / 2
    if problem.projections == 1 or hidden:
        return
    for tiles in candidates:
        column_tiles, rest = divmod(_num_tiles(tiles, problem), device.cores)
        if column_tiles > 1 and rest == 0:
            yield dataclasses.replace(tiles, column_tiles=column_tiles)


def _tiles(chunk: int, rows: int, columns: int, problem: RowsProblem, device: TpuDevice) -> RowTiles:
    mean_rows = problem.num_rows / problem.num_groups
    if chunk == LANES or rows == chunk > device.mxu_size:
        # A narrow matrix unit has loaded its weights after few rows; where loading takes long, every row less counts.
        remainder = least = 64
    else:
        # Each size of a remainder is code of its own; large groups hardly gain from fine ones.
        remainder, least = chunk // 4 if mean_rows < 4 * chunk else chunk // 2, device.mxu_size
    # Sums of more than a chunk leave few registers; where the contraction ends with part of a matrix unit, that is too few.
    fills_units = problem.width_in % device.mxu_size == 0
    most = chunk if chunk == device.mxu_size == LANES and not fills_units else 2 * chunk - remainder
    return RowTiles(rows=rows, columns=columns, chunk=chunk, remainder=remainder, least=least, most=most)


def _estimated_seconds(tiles: RowTiles, problem: RowsProblem, device: TpuDevice) -> float:
    both = (_product_seconds(tiles, problem, device), _copy_seconds(tiles, problem, device))
    overlapped = sum(seconds**OVERLAP_EXPONENT for seconds in both) ** (1 / OVERLAP_EXPONENT)
    passes = _passes(tiles, problem)
    visits = _visits(tiles, problem) * _num_tiles(tiles, problem) / _cores_used(passes, device)
    # The first copies of a pass, and its last, overlap with nothing: the rows of a visit, as many as there are, and weights.
    visit_rows = min(tiles.rows, problem.num_rows / problem.num_groups)
    bytes_alone = problem.width_in * problem.itemsize * (visit_rows + tiles.columns * problem.projections)
    return overlapped + visits * SECONDS_PER_VISIT + passes * bytes_alone / device.hbm_bytes_per_second


def _visits(tiles: RowTiles, problem: RowsProblem) -> float:
    """Expected number, if groups are about as large as their mean."""
    groups = min(problem.num_groups, problem.num_rows)
    return groups * math.ceil((problem.num_rows / max(groups, 1) + 8) / tiles.rows)


def _product_seconds(tiles: RowTiles, problem: RowsProblem, device: TpuDevice) -> float:
    groups = min(problem.num_groups, problem.num_rows)
    mean_rows = problem.num_rows / max(groups, 1)
    rest_rows = mean_rows * (1 - POPULAR_SHARE * POPULAR_ROWS) / (1 - POPULAR_SHARE)
    popular = _product_rows(POPULAR_ROWS * mean_rows, tiles, device)
    rows = groups * (POPULAR_SHARE * popular + (1 - POPULAR_SHARE) * _product_rows(rest_rows, tiles, device))
    # One pass of float32 operands is six of bfloat16.
    cost = 6 if problem.itemsize == 4 else 1
    # A matrix unit multiplies by as many columns as it has at least.
    columns = _num_tiles(tiles, problem) * round_up(tiles.columns, device.mxu_size)
    flops = 2 * rows * problem.width_in * columns * problem.projections * cost
    return flops / device.flops_per_second * device.cores / _cores_used(_passes(tiles, problem), device)


def _product_rows(mean_rows: float, tiles: RowTiles, device: TpuDevice) -> float:
    """Rows of which the products take as long as those of a group, on average over sizes around `mean_rows`."""
    more, least = PRODUCT_ROWS[device.name]

    def at_once(size: int) -> float:
        return max(size + more, least + 0.6 * size)

    sizes = sorted({*tiles.remainders, tiles.chunk})
    total = 0.0
    for part in range(8):
        rows = max(mean_rows + 8 + (part / 8 - 0.5) * min(tiles.chunk, mean_rows), 1)
        chunks = math.ceil(max(rows - sizes[-1], 0) / tiles.chunk)
        rest = next(size for size in sizes if rows - chunks * tiles.chunk <= size)
        total += chunks * at_once(tiles.chunk) + at_once(rest)
    return total / 8


def _copy_seconds(tiles: RowTiles, problem: RowsProblem, device: TpuDevice) -> float:
    groups = min(problem.num_groups, problem.num_rows)
    weights = groups * problem.projections * problem.width_out * problem.width_in * problem.itemsize
    # A group that is one visit is read once in a pass; most are, if one with a quarter more rows than the mean would be.
    one_visit = 1.25 * problem.num_rows / max(groups, 1) + 8 <= tiles.rows
    reads = _passes(tiles, problem) if one_visit else _num_tiles(tiles, problem)
    rows = problem.num_rows * problem.width_in * problem.itemsize * reads
    parts = 1 + (problem.projections if problem.kept else 0)
    results = problem.num_rows * problem.width_out * parts * problem.output_itemsize
    return (weights + rows + results) / device.hbm_bytes_per_second


def _num_tiles(tiles: RowTiles, problem: RowsProblem) -> int:
    """Of columns."""
    return math.ceil(problem.width_out / tiles.columns)


def _passes(tiles: RowTiles, problem: RowsProblem) -> int:
    return _num_tiles(tiles, problem) // tiles.column_tiles


def _cores_used(passes: int, device: TpuDevice) -> float:
    """How many cores compute on average: passes over columns are dealt to them."""
    return passes / math.ceil(passes / device.cores)


def _vmem_bytes(tiles: RowTiles, problem: RowsProblem, device: TpuDevice) -> int:
    return rows_vmem_bytes(
        tiles,
        width_in=problem.width_in,
        projections=problem.projections,
        kept=problem.kept,
        scaled_rows=problem.scaled_rows,
        itemsize=problem.itemsize,
        output_itemsize=problem.output_itemsize,
        device=device,
    )
