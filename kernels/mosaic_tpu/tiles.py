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
    """Rows that are multiplied at once, again and again; with many rows at least as many as a matrix unit has, so that loading
    weights into it takes no longer than multiplying by them."""
    remainder: int
    """The last rows of a group are multiplied as the next multiple of this many, a multiple of 16 that divides `chunk`."""
    least: int
    """Fewest rows that are multiplied at once, a multiple of `remainder` up to `chunk`. Below the rows of a matrix unit its
    weights take longer to load than to use, and fewer rows gain little."""
    most: int
    """Most rows that are multiplied at once, so that few rows of a group need not be multiplied alone: at least `chunk`."""
    column_tiles: int = 1
    """Tiles of columns that one pass over the groups computes, each group's one after the other: its weights arrive as they do in
    passes of their own, but rows that one visit takes stay for all of them. Divides the number of tiles."""

    @property
    def remainders(self) -> tuple[int, ...]:
        """Numbers of rows, other than a chunk, that are multiplied at once at the end of a group, each by code of its own."""
        sizes = range(self.least, min(self.most, self.rows) + 1, self.remainder)
        return tuple(size for size in sizes if size != self.chunk)
