"""In which order a pass of the rows kernel goes through visits and tiles of columns."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from .schedule import VisitTable, one_hot
from .tiles import RowTiles


class StepTable(NamedTuple):
    """The steps of a pass that computes several tiles of columns: all visits to a group for the first tile, then for the next."""

    visit: Int[Array, "steps"]
    """Which entry of the table of visits; 0 from `count` on, as are the others."""
    column: Int[Array, "steps"]
    """Which tile of columns, of those of the pass."""
    slot: Int[Array, "steps"]
    """Which of two buffers has the rows: that of the step before if the visit is the same, else the other."""
    count: Int[Array, "1"]  # pyright: ignore[reportIncompatibleMethodOverride] - tuple.count is of no use here
    """How many steps there are."""

    @classmethod
    def of(cls, table: VisitTable, column_tiles: int) -> Self:
        """The steps for all visits of `table`, in each of which so many tiles of columns are computed."""
        most = table.group.shape[0]
        exists = jnp.arange(most) < table.count[0]
        # Visits in groups before a visit's own, and in its own.
        before = jnp.sum(exists & (table.group[None, :] < table.group[:, None]), axis=1)
        own = jnp.sum(exists & (table.group[None, :] == table.group[:, None]), axis=1)

        step = jnp.arange(most * column_tiles, dtype=jnp.int32)
        first = jnp.sum(exists & (column_tiles * (before + own)[None, :] <= step[:, None]), axis=1)
        visits = jnp.maximum(jnp.sum(jnp.where(one_hot(first, most), own[None, :], 0), axis=1), 1)
        within = step - column_tiles * first
        count = column_tiles * table.count
        visit = first + within % visits
        changes = jnp.concatenate([jnp.zeros(1, bool), visit[1:] != visit[:-1]])
        visit, column, slot = (
            jnp.where(step < count, values, 0).astype(jnp.int32)
            for values in (visit, within // visits, jnp.cumsum(changes) % 2)
        )
        return cls(visit, column, slot, count)

    def brings_rows(self, step: Int[Array, ""]) -> Array:
        """Whether its rows are not those of the step before; also for tables of a kernel's references."""
        return (step == 0) | (self.slot[step] != self.slot[jnp.maximum(step - 1, 0)])


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which visit each step of the grid is, and for which tile of columns."""

    table: VisitTable
    """The visits."""
    steps: StepTable | None
    """None if every step is the visit of its number."""
    column_tiles: int
    """See `RowTiles`."""

    @classmethod
    def of(cls, tables: Sequence[Any], tiles: RowTiles) -> Self:
        """From the columns of both tables, one after the other, as a kernel gets them."""
        split = len(VisitTable._fields)
        steps = StepTable(*tables[split:]) if tiles.column_tiles > 1 else None
        return cls(VisitTable(*tables[:split]), steps, tiles.column_tiles)

    @property
    def count(self) -> Array:
        """How many steps there are."""
        return (self.steps or self.table).count[0]

    def visit(self, step: Array) -> Array:
        """Which entry of the table of visits."""
        return step if self.steps is None else self.steps.visit[step]

    def tile(self, column: Array, step: Array) -> Array:
        """Of all tiles of columns, given that of the grid."""
        return column if self.steps is None else column * self.column_tiles + self.steps.column[step]

    def slot(self, step: Array) -> Array:
        """Which buffer has the rows."""
        return lax.rem(step, 2) if self.steps is None else self.steps.slot[step]
