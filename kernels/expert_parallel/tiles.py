"""Tile sizes of the expert-parallel kernel, from what the device's vector memory holds."""

import dataclasses

from ..device import TpuDevice

_LANES = 128
_MOST_ROWS = 1024
_MOST_INTERMEDIATE = 512
"""Beyond it, adding to the accumulator is a negligible part of a block's work."""
_STRIP = 1024
_VMEM_FRACTION = 0.9
"""Left for what the compiler keeps there itself: spills, and results of matmuls on their way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParallelTiles:
    """Tile sizes of `kernel.py`."""

    rows: int
    """Most rows of an expert that are computed between two readings of its weights; a multiple of `chunk`."""
    intermediate: int
    """Part of I of which weights are in vector memory at once: a multiple of 128 that divides I."""
    chunk: int
    """Rows that are multiplied at once; a multiple of 16. The last ones of a tile go in quarters of it, if those are."""
    strip: int
    """Part of H that is accumulated at once: divides H."""

    @property
    def step(self) -> int:
        """Rows that the number of rows computed is rounded up to."""
        return self.chunk // 4 if self.chunk % 64 == 0 else self.chunk


def vmem_bytes(tiles: ExpertParallelTiles, *, projections: int, hidden: int, itemsize: int) -> int:
    """Vector memory that the kernel's buffers take, and its largest temporary arrays."""
    rows = tiles.rows * hidden * (2 * itemsize + 4)  # two tiles of rows, one accumulator
    weights = 2 * (projections + 1) * tiles.intermediate * hidden * itemsize
    biases = 2 * 4 * (8 * tiles.intermediate * projections + 8 * hidden)
    temporaries = 4 * tiles.chunk * ((projections + 2) * tiles.intermediate + 2 * tiles.strip)
    return rows + weights + biases + temporaries


def default_tiles(
    device: TpuDevice, *, projections: int, hidden: int, intermediate: int, itemsize: int, most_rows: int
) -> ExpertParallelTiles:
    """The most rows per reading of the weights, then the most of I, that vector memory holds.

    More rows than make multiplying a block of weights take as long as reading it are of no use.

    Args:
        device: what it is for.
        projections: 2 for gate and up, 1 for gate alone.
        hidden: H, a multiple of 128.
        intermediate: I, a multiple of 128.
        itemsize: bytes of an element of rows and weights.
        most_rows: rows that one expert can get, a multiple of 16.

    Raises:
        ValueError: not even the smallest tiles fit.
    """
    balanced = device.flops_per_second / device.hbm_bytes_per_second * itemsize / 2
    useful = min(_MOST_ROWS, max(device.mxu_size, _power_of_two(balanced)), _power_of_two(most_rows))
    parts = [
        part for part in range(_LANES, min(intermediate, _MOST_INTERMEDIATE) + 1, _LANES) if intermediate % part == 0
    ]
    strip = max(width for width in range(_LANES, min(hidden, _STRIP) + 1, _LANES) if hidden % width == 0)
    rows = useful
    while rows >= 16:
        for part in reversed(parts):
            tiles = ExpertParallelTiles(rows=rows, intermediate=part, chunk=min(device.mxu_size, rows), strip=strip)
            needed = vmem_bytes(tiles, projections=projections, hidden=hidden, itemsize=itemsize)
            if needed <= _VMEM_FRACTION * device.vmem_bytes:
                return tiles
        rows //= 2
    raise ValueError(
        f"H={hidden} is too large for the vector memory of {device.name}, {device.vmem_bytes} bytes: 16 rows, and the weights of"
        f" {_LANES} of I, must fit"
    )


def _power_of_two(value: float) -> int:
    """The least power of two that is not smaller, and at least 16."""
    power = 16
    while power < value:
        power *= 2
    return power
