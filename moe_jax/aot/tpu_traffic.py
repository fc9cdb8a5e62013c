"""Bytes that the kernel on rows moves between device memory and vector memory: counted from its own schedule."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.aot.tpu_calls import TpuKernelCall
from moe_jax.kernels.mosaic_tpu.schedule import ROW_ALIGNMENT, VisitTable
from moe_jax.kernels.mosaic_tpu.steps import StepTable

_NUM_TABLES = len(VisitTable._fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsTraffic:
    """Bytes of one call of the kernel on rows."""

    rows_read: int
    weights_read: int
    results_written: int
    experts_read: tuple[int, ...]
    """Groups whose weights are read."""

    @property
    def other_than_weights(self) -> int:
        """Rows that are read, and results that are written."""
        return self.rows_read + self.results_written


def rows_traffic(call: TpuKernelCall) -> RowsTraffic:
    """The bytes that a call of `grouped_rows` moves; biases and scales, which are small, are not among them.

    In each pass the kernel walks over all visits, for one tile of columns or, group by group, for several. It copies the rows of
    a visit when it is not that of the step before, and weights when the group or the tile of columns is another.

    Raises:
        ValueError: the call is one of another kernel.
    """
    if call.name != "grouped_rows":
        raise ValueError(f"a call of grouped_rows is needed, got one of {call.name}")
    mapping = call.equation.params["grid_mapping"]
    # The bound of the grid comes first, then the tables, then rows and weights.
    num_tables = mapping.num_index_operands
    columns: list[Any] = [_column(call.scalars[1 + index]) for index in range(num_tables)]
    rows, weights = call.operands[1 + num_tables], call.operands[2 + num_tables]
    block = mapping.block_mappings[1].block_aval
    passes = int(mapping.grid[0])

    table = VisitTable(*columns[:_NUM_TABLES])
    group, last, stored = (np.asarray(column[: table.count[0]]) for column in (table.group, table.last, table.stored))
    if num_tables > _NUM_TABLES:
        steps = StepTable(*columns[_NUM_TABLES:])
        visit, tile = (np.asarray(column[: steps.count[0]]) for column in (steps.visit, steps.column))
        brings_rows = _changes(np.asarray(steps.slot[: steps.count[0]]))
    else:
        visit, tile = np.arange(len(group)), np.zeros(len(group), int)
        brings_rows = np.ones(len(group), bool)
    copied_rows = -(-last[visit[brings_rows]] // ROW_ALIGNMENT) * ROW_ALIGNMENT
    brings_weights = _changes(group[visit]) | _changes(tile)
    return RowsTraffic(
        rows_read=passes * int(copied_rows.sum()) * rows.shape[1] * rows.dtype.itemsize,
        weights_read=passes * int(brings_weights.sum()) * math.prod(block.shape) * weights.dtype.itemsize,
        results_written=sum(
            int(stored.sum()) * math.prod(result.shape) // result.shape[-2] * result.dtype.itemsize
            for result in call.results
        ),
        experts_read=tuple(sorted(set(group.tolist()))),
    )


def _changes(values: np.ndarray) -> np.ndarray:
    """Which entries differ from those before them; the first does."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def _column(values: Sequence[int] | int) -> Sequence[int]:
    return [values] if isinstance(values, int) else values
