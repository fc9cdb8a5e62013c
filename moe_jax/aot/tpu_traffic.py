"""Bytes that the kernel on rows moves between device memory and vector memory: counted from its own schedule."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.aot.tpu_calls import TpuKernelCall
from moe_jax.kernels.mosaic_tpu.schedule import ROW_ALIGNMENT, VisitTable

_NUM_TABLES = len(VisitTable._fields)
_ROWS, _WEIGHTS = _NUM_TABLES + 1, _NUM_TABLES + 2
"""Positions of operands: the bound of the grid and the tables come first."""


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

    For each tile of columns the kernel walks over all visits. It copies the rows of a visit, and weights when the group is not
    that of the visit before.

    Raises:
        ValueError: the call is one of another kernel.
    """
    if call.name != "grouped_rows":
        raise ValueError(f"a call of grouped_rows is needed, got one of {call.name}")
    columns: list[Any] = [_column(call.scalars[1 + index]) for index in range(_NUM_TABLES)]
    table = VisitTable(*columns)
    count = int(table.count[0])
    group, last, stored = (np.asarray(column[:count]) for column in (table.group, table.last, table.stored))
    rows, weights = call.operands[_ROWS], call.operands[_WEIGHTS]
    block = call.equation.params["grid_mapping"].block_mappings[_WEIGHTS - _NUM_TABLES - 1].block_aval
    passes = int(call.equation.params["grid_mapping"].grid[0])
    changes = 1 + int(np.sum(group[1:] != group[:-1])) if count else 0
    if passes > 1 and len(set(group.tolist())) == 1:
        changes = 1  # in every pass: the tile of columns changes
    copied_rows = -(-last // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return RowsTraffic(
        rows_read=passes * int(copied_rows.sum()) * rows.shape[1] * rows.dtype.itemsize,
        weights_read=passes * changes * math.prod(block.shape) * weights.dtype.itemsize,
        results_written=sum(
            int(stored.sum()) * math.prod(result.shape) // result.shape[-2] * result.dtype.itemsize
            for result in call.results
        ),
        experts_read=tuple(sorted(set(group.tolist()))),
    )


def _column(values: Sequence[int] | int) -> Sequence[int]:
    return [values] if isinstance(values, int) else values
