"""Tile sizes of the kernel for few rows. Apart from it, because choosing them must not import Pallas TPU."""

import dataclasses

from ..device import TpuDevice
from .limits import LANES, vmem_limit_bytes
from .rounding import ceil_div

MOST_ROWS = 128
"""Of a visit. Up to here, multiplying takes less time than reading the weights on every device."""
BLOCK_BYTES = 2 * 2**20
"""About what a block of weights has: large beside what starting a copy costs, small beside what an expert has, because nothing
is copied while the last block is multiplied."""
BYTES_IN_FLIGHT = 8 * 2**20
"""About what all slots hold: several times what any of the devices reads while one copy is under way."""
MOST_SLOTS, FEWEST_SLOTS = 8, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamTiles:
    """Tile sizes of the kernel that reads weights as fast as memory allows (`stream_kernel.py`): few rows per group."""

    rows: int
    """Most rows of a visit, a power of two from 16 on: groups with more read their weights again."""
    columns: int
    """Output columns of a block of weights, of gate and of up each: a multiple of 128."""
    slots: int
    """Blocks of weights that are in vector memory at once: one is multiplied, the others are on their way."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that are multiplied at once, each by code of its own."""
        return tuple(16 * 2**power for power in range((self.rows // 16).bit_length()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamShape:
    """Static sizes of a grouped matmul of few rows."""

    width_in: int
    """D, the dimension that is contracted."""
    width_out: int
    """N, of gate and of up each: a multiple of 16."""
    projections: int
    """Matrices per group: 2 (gate and up) or 1."""
    itemsize: int
    """Bytes of an operand's element."""
    output_itemsize: int
    """Bytes of a result's element."""

    def num_blocks(self, tiles: StreamTiles) -> int:
        """Blocks of a group's weights."""
        return ceil_div(self.width_out, tiles.columns)

    def blocks_per_core(self, tiles: StreamTiles, device: TpuDevice) -> int:
        """How many of them one of the device's cores reads; the last core may find fewer."""
        return ceil_div(self.num_blocks(tiles), device.cores)

    def num_cores(self, tiles: StreamTiles, device: TpuDevice) -> int:
        """How many cores find any."""
        return ceil_div(self.num_blocks(tiles), self.blocks_per_core(tiles, device))

    def vmem_bytes(self, tiles: StreamTiles, device: TpuDevice) -> int:
        """Vector memory that the kernel takes."""
        depth = ceil_div(self.width_in, LANES) * LANES
        width = self.blocks_per_core(tiles, device) * tiles.columns
        weights = tiles.slots * self.projections * tiles.columns * depth * self.itemsize
        rows = 2 * tiles.rows * (depth * self.itemsize + LANES * 4)
        results = (2 * tiles.rows + 16) * width * self.output_itemsize
        bias = 2 * 8 * device.cores * width * 4
        products = 2 * tiles.rows * self.projections * tiles.columns * 4
        return weights + rows + results + bias + products


def default_stream_tiles(num_rows: int, shape: StreamShape, device: TpuDevice) -> StreamTiles:
    """Tiles from static sizes alone.

    Blocks of about `BLOCK_BYTES` that the device's cores share evenly, and as many slots as hold
    `BYTES_IN_FLIGHT`, but no more than fit.

    Raises:
        ValueError: not even the smallest tiles fit, because a row is too long.
    """
    rows = 16
    while rows < min(num_rows, MOST_ROWS):
        rows *= 2
    units = ceil_div(shape.width_out, LANES)
    unit_bytes = LANES * shape.projections * shape.width_in * shape.itemsize
    most_units = max(BLOCK_BYTES // unit_bytes, 1)
    # The largest blocks of those that leave the busiest core least.
    columns = LANES * min(
        range(min(most_units, units), 0, -1), key=lambda block: ceil_div(ceil_div(units, block), device.cores) * block
    )
    wanted = ceil_div(BYTES_IN_FLIGHT, columns // LANES * unit_bytes)
    for slots in range(min(max(wanted, FEWEST_SLOTS), MOST_SLOTS), 1, -1):
        tiles = StreamTiles(rows=rows, columns=columns, slots=slots)
        if shape.vmem_bytes(tiles, device) <= vmem_limit_bytes(device):
            return tiles
    raise ValueError(f"no tiles for {shape} fit the {vmem_limit_bytes(device)} bytes that {device.name} has to give")


def check_stream_tiles(tiles: StreamTiles, shape: StreamShape, device: TpuDevice) -> None:
    """Whether tile sizes fit the shape and the device.

    Raises:
        ValueError: they don't; says which limit was hit.
    """
    if shape.width_out % 16:
        raise ValueError(f"weights must have a multiple of 16 rows, got {shape.width_out}")
    if tiles.rows < 16 or tiles.rows & (tiles.rows - 1):
        raise ValueError(f"rows of a tile must be a power of two from 16 on, got {tiles.rows}")
    if tiles.columns < LANES or tiles.columns % LANES:
        raise ValueError(f"columns of a tile must be a multiple of {LANES}, got {tiles.columns}")
    if tiles.slots < 2:
        raise ValueError(f"slots must be at least 2, got {tiles.slots}")
    needed = shape.vmem_bytes(tiles, device)
    if needed > vmem_limit_bytes(device):
        raise ValueError(
            f"{tiles} take {needed} bytes of vector memory, {device.name} has {vmem_limit_bytes(device)} to give"
        )
