"""Tile sizes of the kernel for gradients of weights. Apart from it, because choosing them must not import Pallas TPU."""

import dataclasses

from ..device import TpuDevice
from .limits import LANES, vmem_limit_bytes
from .rounding import ceil_div

MOST_TILE_ELEMENTS = 2048 * 1536
"""Of the default: every element of a tile is code of its own, which takes the compiler time, and memory that holds instructions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsGradientTiles:
    """Tile sizes of the kernel that multiplies transposed rows with rows, group by group (`weights_gradient_kernel.py`)."""

    out_columns: int
    """Columns of the cotangent, rows of the gradient: a multiple of 128."""
    in_columns: int
    """Columns of the rows, columns of the gradient: a multiple of 128."""
    rows: int
    """Most rows of a visit, a multiple of `depth`: how many products are summed before they are added to what is in memory."""
    depth: int
    """The last rows of a group are multiplied as the next multiple of this many: as many as a matrix unit has."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of rows that the last visit to a group multiplies, each by code of its own."""
        return tuple(range(self.depth, self.rows + 1, self.depth))


def default_weights_gradient_tiles(
    num_rows: int,
    width_out: int,
    width_in: int,
    itemsize: int,
    output_itemsize: int,
    device: TpuDevice,
) -> WeightsGradientTiles:
    """The tiles that read and multiply least, of those that fit the device's vector memory.

    A visit has as many rows as two matrix units, so that adding to what is in memory takes no longer than multiplying. A tile
    of the gradient is as large as it may be, because each operand is read again for every tile along the other's columns, and
    tiles along one side are equally large, because the last one is multiplied whole. The device's
    cores share the tiles of the first side.

    Args:
        num_rows: M.
        width_out: N.
        width_in: D.
        itemsize: bytes per element of the operands.
        output_itemsize: bytes per element of the gradient.
        device: see `TpuDevice`.
    """
    depth = device.mxu_size
    rows = depth if num_rows <= depth else 2 * depth

    def sides(width: int, multiple: int, cores: int) -> list[int]:
        """Equal sizes for any number of tiles, largest first."""
        units = ceil_div(width, multiple)
        return sorted(
            {ceil_div(units, tiles) * multiple for tiles in range(min(cores, units), units + 1)}, reverse=True
        )

    candidates = [
        WeightsGradientTiles(out_columns=out_columns, in_columns=in_columns, rows=rows, depth=depth)
        for out_columns in sides(width_out, LANES, device.cores)
        for in_columns in sides(width_in, device.mxu_size, 1)
    ]
    limit = vmem_limit_bytes(device)
    # One pass of float32 operands is six of bfloat16.
    most_elements = MOST_TILE_ELEMENTS // (6 if itemsize == 4 else 1)

    def cost(tiles: WeightsGradientTiles) -> float:
        out_tiles, in_tiles = ceil_div(width_out, tiles.out_columns), ceil_div(width_in, tiles.in_columns)
        idle = ceil_div(out_tiles, device.cores) * device.cores / out_tiles
        multiplied = 2 * out_tiles * tiles.out_columns * in_tiles * tiles.in_columns * idle
        read = (width_out * in_tiles + width_in * out_tiles) * itemsize
        return multiplied / device.flops_per_second + read / device.hbm_bytes_per_second

    fitting = [
        tiles
        for tiles in candidates
        if tiles.out_columns * tiles.in_columns <= most_elements
        and weights_gradient_vmem_bytes(tiles, itemsize, output_itemsize) <= limit
    ]
    return min(fitting, key=cost)


def weights_gradient_vmem_bytes(tiles: WeightsGradientTiles, itemsize: int, output_itemsize: int) -> int:
    """Vector memory that the kernel takes: operands and gradient twice, sums, and a transposed operand."""
    operands = (3 * tiles.out_columns + 2 * tiles.in_columns) * tiles.rows * itemsize
    return operands + tiles.out_columns * tiles.in_columns * (4 + 2 * output_itemsize)


def check_weights_gradient_tiles(
    tiles: WeightsGradientTiles, itemsize: int, output_itemsize: int, device: TpuDevice
) -> None:
    """Whether tile sizes fit each other and the device.

    Raises:
        ValueError: they don't; says which limit was hit.
    """
    for name in ("out_columns", "in_columns", "depth"):
        value = getattr(tiles, name)
        if value < LANES or value % LANES:
            raise ValueError(f"{name} must be a multiple of {LANES}, got {value}")
    if tiles.rows < tiles.depth or tiles.rows % tiles.depth:
        raise ValueError(f"rows of a tile must be a multiple of depth={tiles.depth}, got {tiles.rows}")
    needed = weights_gradient_vmem_bytes(tiles, itemsize, output_itemsize)
    if needed > vmem_limit_bytes(device):
        raise ValueError(
            f"{tiles} take {needed} bytes of vector memory, {device.name} has {vmem_limit_bytes(device)} to give"
        )
