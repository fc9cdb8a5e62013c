"""Which rows of which group a step of a kernel works on: the tables that kernels have prefetched into scalar memory.

Rows lie as the caller has them, groups one after the other. A kernel visits each group's rows in tiles: the group's first tile
starts at the last multiple of 16 rows that is not after the group's first row, because that is what a copy from device memory
can address for every dtype (a tile of bfloat16 is 16 rows high), and each further tile starts where the one before it ended.
Tiles therefore follow the groups, not a fixed grid: a group of s rows is computed in ceil((s + up to 15) / tile) tiles, the last
of which is cut short. A group without rows is not visited.

Two visits share rows only where a group begins in the middle of 16 rows. The earlier visit leaves those 16 rows to the later one,
which writes them whole (`stored`), so no row is written twice, and the writes of successive visits may overlap in time.
"""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..groups import Groups
from ..varying import varying_like
from .rounding import ceil_div, round_up

ROW_ALIGNMENT = 16


def aligned_num_rows(num_rows: int, num_groups: int) -> int:
    """Rows that hold `num_rows` rows of `num_groups` groups, each of which starts at a multiple of 16."""
    padding = (ROW_ALIGNMENT - 1) * min(num_groups, num_rows)
    return round_up(num_rows + padding, ROW_ALIGNMENT)


def aligned_groups(sizes: Int[Array, "G"]) -> Groups:
    """Groups of these sizes, each of which starts at a multiple of 16, so that no two share 16 rows."""
    spaces = round_up(sizes, ROW_ALIGNMENT)
    return Groups(jnp.cumsum(spaces) - spaces, sizes)


class VisitTable(NamedTuple):
    """The visits, in the order of the rows; entries from `count` on are those of a visit to nothing."""

    group: Int[Array, "visits"]
    """Group whose weights are multiplied with. A visit that writes zeros names the group of a visit beside it, so that a
    kernel which copies weights for every visit copies none for this one."""
    source: Int[Array, "visits"]
    """First row that is read, a multiple of 16; a visit that writes zeros names that of a visit beside it."""
    row: Int[Array, "visits"]
    """First row that is written, a multiple of 16; the same as `source` unless zeros are written."""
    first: Int[Array, "visits"]
    """First row that belongs to the group, relative to `row`: 0 to 15."""
    last: Int[Array, "visits"]
    """End of the rows that belong to the group, relative to `row`: at most the tile's rows; 0 if zeros are written."""
    stored: Int[Array, "visits"]
    """How many rows are written, from `row` on: a multiple of 16, at most the tile's rows; 0 if the visits that follow have
    rows in the same 16."""
    count: Int[Array, "1"]  # pyright: ignore[reportIncompatibleMethodOverride] - tuple.count is of no use here
    """How many visits there are."""
    first_matrix: Int[Array, "1"]
    """Which of the weights' matrices is the first group's; those of the other groups follow."""

    @classmethod
    def of(
        cls,
        groups: Groups,
        num_rows: int,
        tile_rows: int,
        *,
        first_matrix: int | Int[Array, ""] = 0,
        zero_outside: bool = False,
        visit_empty: bool = False,
    ) -> Self:
        """The visits to `groups`, with `tile_rows` rows each. The table's length depends on shapes alone.

        Args:
            groups: consecutive groups of rows.
            num_rows: how many rows there are, a multiple of 16.
            tile_rows: most rows of a visit, a multiple of 16.
            first_matrix: see the field.
            zero_outside: also visit, to write zeros, every other multiple of 16 rows of which no row belongs to a group.
            visit_empty: visit groups without rows once, with `first == last`.

        Raises:
            ValueError: `num_rows` or `tile_rows` is no multiple of 16.
        """
        for name, value in {"num_rows": num_rows, "tile_rows": tile_rows}.items():
            if value % ROW_ALIGNMENT:
                raise ValueError(f"{name} must be a multiple of {ROW_ALIGNMENT}, got {value}")
        num_groups = groups.sizes.shape[0]
        begin = _round_down(groups.starts)
        end = groups.starts + groups.sizes
        offset = groups.starts - begin
        visits_of_group = jnp.where(groups.sizes > 0, ceil_div(end - begin, tile_rows), int(visit_empty))
        # A group of s rows has at most (s + 15 + tile_rows - 1) / tile_rows visits.
        occupied = num_groups if visit_empty else min(num_groups, num_rows)
        most = (num_rows + (ROW_ALIGNMENT + tile_rows - 2) * occupied) // tile_rows
        if zero_outside:
            visited_begin = jnp.where(end[-1] > groups.starts[0], begin[0], 0)
            visited_end = jnp.where(end[-1] > groups.starts[0], round_up(end[-1], ROW_ALIGNMENT), 0)
            before, after = ceil_div(visited_begin, tile_rows), ceil_div(num_rows - visited_end, tile_rows)
            most += 2
        else:
            visited_begin = visited_end = before = after = jnp.int32(0)

        ends = jnp.cumsum(visits_of_group)
        visit = jnp.arange(max(most, 1), dtype=jnp.int32)
        own = visit - before
        num_own = ends[-1]
        own_or_beside = jnp.clip(own, 0, jnp.maximum(num_own - 1, 0))
        is_group = one_hot(jnp.sum(own_or_beside[:, None] >= ends[None, :], axis=1), num_groups)

        def of_group(values: Int[Array, "G"]) -> Int[Array, "visits"]:
            """Without a gather, which takes the compiler for TPUs long."""
            return jnp.sum(jnp.where(is_group, values[None, :], 0), axis=1)

        within = own_or_beside - of_group(ends - visits_of_group)
        group = of_group(jnp.arange(num_groups))
        source = of_group(begin) + within * tile_rows
        is_own = (own >= 0) & (own < num_own)
        outside = jnp.where(own < 0, visit * tile_rows, visited_end + (own - num_own) * tile_rows)
        row = jnp.where(is_own, source, outside)
        first = jnp.where(is_own & (within == 0), of_group(offset), 0)
        last = jnp.where(is_own, jnp.clip(of_group(end) - row, 0, tile_rows), 0)
        count = before + num_own + after
        # A visit writes as far as the next one begins: where its own rows end, or 16 rows before if the two share these.
        next_row = jnp.concatenate([row[1:], jnp.zeros(1, jnp.int32)])
        next_row = jnp.where(own == -1, visited_begin, next_row)
        no_next = visit == count - 1
        stop = jnp.where(is_own, row + round_up(last, ROW_ALIGNMENT), jnp.minimum(row + tile_rows, num_rows))
        stored = jnp.where(no_next, stop, next_row) - row
        exists = visit < count
        group, source, row, first, last, stored = (
            jnp.where(exists, column, 0).astype(jnp.int32) for column in (group, source, row, first, last, stored)
        )
        first_matrix = varying_like(jnp.asarray(first_matrix, jnp.int32), count)
        return cls(group, source, row, first, last, stored, count[None].astype(jnp.int32), first_matrix[None])

    def matrix(self, visit: int | Int[Array, ""]) -> Int[Array, ""]:
        """Which of the weights' matrices a visit multiplies with; also for tables of a kernel's references."""
        return self.group[visit] + self.first_matrix[0]


def _round_down(value: Array) -> Array:
    return value // ROW_ALIGNMENT * ROW_ALIGNMENT


def one_hot(index: Int[Array, "visits"], size: int) -> Array:
    """`[visits, size]`: True where the second axis is at the index."""
    return index[:, None] == jnp.arange(size)[None, :]
