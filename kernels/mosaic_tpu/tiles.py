"""Tile sizes of the kernels: hashable data, checked against what the hardware can hold."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTiles:
    """Tile sizes of the kernel that multiplies rows by their group's matrix (`rows_kernel.py`): many rows per group."""

    rows: int
    """Most rows of a visit: a multiple of `chunk`."""
    columns: int
    """Output columns of a tile, of gate and of up each: a multiple of 128."""
    chunk: int
    """Rows that are multiplied at once, again and again; as many as a matrix unit has, so that loading weights into it takes no
    longer than multiplying by them."""
    remainder: int
    """The last rows of a group are multiplied as the next multiple of this many, a multiple of 16 that divides `chunk`."""

    @property
    def remainders(self) -> tuple[int, ...]:
        """Numbers of rows that are multiplied at once at the end of a group, each by code of its own: multiples of `remainder`
        below two chunks. More than a chunk at once, because a few rows alone take about as long as a chunk does.
        """
        sizes = range(self.remainder, min(2 * self.chunk, self.rows + 1), self.remainder)
        return tuple(size for size in sizes if size != self.chunk)
