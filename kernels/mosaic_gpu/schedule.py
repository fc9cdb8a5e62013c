"""Which tile of rows belongs to which group: the tables that a kernel's blocks read to find their work.

A kernel runs over tiles of rows of one group each. A tile starts at a multiple of 8 rows, because that is what a swizzled copy
to shared memory can address; the rows of a tile that belong to its group are `first : last`. Two layouts of rows occur:

- *compact*: groups lie one after the other, as the caller of `grouped_matmul` has them. A group's first tile starts at the
  multiple of 8 before the group, and the stores leave out the rows before and after it.
- *aligned*: each group starts at a multiple of 8, and what lies between is padding that kernels may read and overwrite.
  `fused_moe` gathers its rows, so it can place them like this at no cost, and stores need no single rows.
"""

from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..groups import Groups, keep_rows, sums_until

ROW_ALIGNMENT = 8


def aligned_num_rows(num_rows: int, num_groups: int) -> int:
    """Rows of the aligned layout that hold `num_rows` rows of `num_groups` groups, whatever the groups' sizes."""
    padding = (ROW_ALIGNMENT - 1) * min(num_groups, num_rows)
    return -(-(num_rows + padding) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def aligned_groups(sizes: Int[Array, "G"]) -> Groups:
    """Where the groups lie in the aligned layout."""
    spaces = (sizes + (ROW_ALIGNMENT - 1)) & -ROW_ALIGNMENT
    return Groups(sums_until(spaces) - spaces, sizes)


class Alignment(NamedTuple):
    """The way from the compact layout to the aligned one, and back."""

    source: Int[Array, "Maligned"]
    """Row of the compact layout that each aligned row is a copy of; any for padding."""
    place: Int[Array, "M"]
    """Aligned row of each compact row; any for rows of no group."""
    groups: Groups
    """The groups in the aligned layout."""
    contained: Bool[Array, "M"]
    """Whether a compact row belongs to a group."""

    @classmethod
    def of(cls, groups: Groups, num_rows: int) -> Self:
        """Align `groups`, which lie one after the other among `num_rows` rows."""
        num_groups = groups.sizes.shape[0]
        aligned, length = aligned_groups(groups.sizes), aligned_num_rows(num_rows, num_groups)
        row = jnp.arange(num_rows, dtype=jnp.int32)
        group = jnp.sum(row[:, None] >= (groups.starts + groups.sizes)[None, :], axis=1)
        group = jnp.minimum(group, num_groups - 1)
        contained = groups.contain(num_rows)
        place = jnp.where(contained, aligned.starts[group] + row - groups.starts[group], length)
        source = jnp.zeros(length, jnp.int32).at[place].set(row, mode="drop", unique_indices=True)
        return cls(source, jnp.minimum(place, length - 1), aligned, contained)

    def to_compact(self, rows: Float[Array, "Maligned N"]) -> Float[Array, "M N"]:
        """Rows moved back; zero for those of no group."""
        return keep_rows(rows[self.place], self.contained)


class TileTable(NamedTuple):
    """The tiles of rows that exist, in the order of the rows; entries beyond these are zero and mean nothing."""

    group: Int[Array, "tiles"]
    """Group of the tile."""
    row: Int[Array, "tiles"]
    """First row of the tile, a multiple of 8; the tile may reach beyond its group, and beyond the last row."""
    first: Int[Array, "tiles"]
    """First row that belongs to the group, relative to `row`: 0 to 7."""
    last: Int[Array, "tiles"]
    """End of the rows that belong to the group, relative to `row`: at most the tile's rows."""
    ends: Int[Array, "G"]
    """How many tiles there are up to the end of each group."""
    first_matrix: Int[Array, "1"]
    """Which of the weights' matrices (of P projections each) is the first group's; those of the other groups follow."""

    @classmethod
    def of(
        cls,
        groups: Groups,
        num_rows: int,
        tile_rows: int,
        layout: Literal["aligned", "compact"],
        *,
        first_matrix: int | Int[Array, ""] = 0,
    ) -> Self:
        """The tiles of `groups`, with `tile_rows` rows each, in a layout of `num_rows` rows.

        Groups without rows have no tile. The table's length depends on shapes alone.
        """
        # Cheap operations, and one reduction with several results: XLA makes few kernels of it. With few rows, each of these
        # takes as long as the products of an expert.
        offset = groups.starts & (ROW_ALIGNMENT - 1) if layout == "compact" else jnp.zeros_like(groups.starts)
        tiles_of_group = jnp.where(groups.sizes > 0, jax.lax.div(offset + groups.sizes + (tile_rows - 1), tile_rows), 0)
        ends = sums_until(tiles_of_group)
        begins = ends - tiles_of_group
        num_groups = groups.sizes.shape[0]
        tile = jnp.arange(_most_tiles(num_groups, num_rows, tile_rows, layout), dtype=jnp.int32)[:, None]
        columns = (
            jnp.arange(num_groups, dtype=jnp.int32),
            (groups.starts - offset - begins * tile_rows) + tile * tile_rows,
            jnp.where(tile == begins, offset, 0),
            jnp.minimum((offset + groups.sizes + begins * tile_rows) - tile * tile_rows, tile_rows),
        )
        is_of_group = (tile >= begins) & (tile < ends)
        group, row, first, last = jax.lax.reduce(
            [jnp.where(is_of_group, column, 0) for column in columns],
            [jnp.int32(0)] * len(columns),
            lambda some, more: [left + right for left, right in zip(some, more, strict=True)],
            dimensions=(1,),
        )
        return cls(group, row, first, last, ends, jnp.asarray(first_matrix, jnp.int32)[None])


def _most_tiles(num_groups: int, num_rows: int, tile_rows: int, layout: Literal["aligned", "compact"]) -> int:
    """How many tiles there can be, whatever the groups' sizes; at least 1."""
    if layout == "aligned":
        # A group that takes up s rows, at least 8 and a multiple of 8, has at most (s + tile_rows - 8) / tile_rows tiles.
        most_groups = min(num_groups, num_rows // ROW_ALIGNMENT)
        most = (num_rows + (tile_rows - ROW_ALIGNMENT) * most_groups) // tile_rows
    else:
        # A group of s rows has at most (s + 7 + tile_rows - 1) / tile_rows tiles.
        most = (num_rows + (ROW_ALIGNMENT + tile_rows - 2) * min(num_groups, num_rows)) // tile_rows
    return max(most, 1)


def num_tiles(ends: Int[Array, "G"]) -> Int[Array, ""]:
    """How many tiles there are, from a table's `ends` or a kernel's reference to them."""
    return ends[ends.shape[0] - 1]
