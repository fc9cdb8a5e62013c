"""Random problems for kernels on sorted rows, in the layouts that these have, and what float64 says about them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from oracles import experts as oracle

from moe_jax.kernels import Activation
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu.schedule import TileTable, aligned_groups, aligned_num_rows

ROUNDING = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11}
"""Largest relative error of rounding to nearest once."""
ACCUMULATION = 1e-5
"""Error of accumulating in float32, and of an activation in float32, relative to the largest value."""
BEFORE, AFTER = 5, 9
"""Rows of no group around the groups of the compact layout."""


@dataclasses.dataclass(frozen=True)
class RowsProblem:
    """Operands of a kernel that multiplies rows by their group's matrix; NaN in every row that belongs to no group."""

    operands: dict[str, Any]
    """By the kernels' names: rows, weights, projections, contract, bias, activation, row_scale."""
    groups: Groups
    is_compact: bool
    group_of_row: np.ndarray
    """-1 for rows of no group."""
    projected: np.ndarray
    """[rows of groups, P, N]: what enters the activation."""
    result: np.ndarray
    """[rows of groups, N]."""

    @classmethod
    def draw(
        cls,
        rng,
        sizes,
        *,
        compact=False,
        contract="in",
        width_in=208,
        width_out=144,
        activation=None,
        bias=False,
        row_scale=False,
        dtype="bfloat16",
    ):
        """With gate and up if the activation is gated, otherwise with one projection."""
        sizes = np.asarray(sizes, np.int32)
        projections = 2 if activation is not None and activation.is_gated else 1
        if compact:
            groups = Groups(jnp.array(BEFORE + np.cumsum(sizes) - sizes, jnp.int32), jnp.array(sizes))
            num_rows = BEFORE + int(sizes.sum()) + AFTER
        else:
            groups = aligned_groups(jnp.array(sizes))
            num_rows = aligned_num_rows(int(sizes.sum()), len(sizes)) + 8
        group_of_row = np.full(num_rows, -1)
        for group, start in enumerate(groups.starts):
            group_of_row[int(start) : int(start) + sizes[group]] = group
        member = group_of_row >= 0

        rows = jnp.array(np.where(member[:, None], rng.normal(size=(num_rows, width_in)), np.nan), dtype)
        matrices = rng.normal(size=(len(sizes), projections, width_out, width_in)) / width_in**0.5
        matrices = jnp.array(matrices, dtype)
        biases = jnp.array(rng.normal(size=matrices.shape[:3]), jnp.float32)
        scale = jnp.array(rng.uniform(0.5, 1.5, size=num_rows), jnp.float32)

        of_row = group_of_row[member]
        projected = np.einsum("md,mpnd->mpn", np.float64(rows)[member], np.float64(matrices)[of_row], optimize=True)
        if bias:
            projected += np.float64(biases)[of_row]
        result = projected[:, 0]
        if activation is not None:
            parameters = {name: getattr(activation, name) for name in ("limit", "alpha", "beta")}
            result = oracle.activate(activation.name, *np.moveaxis(projected, 1, 0), **parameters)
        if row_scale:
            result = result * np.float64(scale)[member, None]
        side_by_side = matrices.reshape(-1, width_out, width_in)
        operands = dict(
            rows=rows,
            weights=side_by_side if contract == "in" else side_by_side.mT,
            projections=projections,
            contract=contract,
            bias=biases.reshape(-1, width_out) if bias else None,
            activation=activation,
            row_scale=scale if row_scale else None,
        )
        return cls(operands, groups, compact, group_of_row, projected, result)

    @property
    def member(self):
        """Which rows belong to a group."""
        return self.group_of_row >= 0

    def table(self, tile_rows):
        """The tiles; in the compact layout also those of group -1, for the rows before and after the groups."""
        num_rows = len(self.group_of_row)
        if not self.is_compact:
            return TileTable.of(self.groups, num_rows, tile_rows, "aligned")
        end = num_rows - AFTER
        starts, sizes = ([*surrounding[:1], *own, *surrounding[1:]] for surrounding, own in self._surroundings(end))
        table = TileTable.of(Groups(jnp.array(starts), jnp.array(sizes)), num_rows, tile_rows, "compact")
        last = len(sizes) - 1
        return table._replace(group=jnp.where(table.group == last, 0, table.group) - 1)

    def _surroundings(self, end):
        return ((0, end), self.groups.starts), ((BEFORE, AFTER), self.groups.sizes)

    def assert_right(self, result, projected=None):
        """Rows of groups are right; in the compact layout every other row is zero."""
        assert_rounded_once(np.asarray(result)[self.member], self.result)
        if projected is not None:
            assert_rounded_once(np.asarray(projected)[self.member], self.projected)
        if self.is_compact:
            np.testing.assert_array_equal(np.asarray(result, np.float64)[~self.member], 0)


def assert_rounded_once(result, expected):
    """Rounded to nearest once, besides the error of accumulating in float32."""
    error = np.abs(np.asarray(result, np.float64) - expected)
    bound = 1.01 * ROUNDING[str(result.dtype)] * np.abs(expected) + ACCUMULATION * np.abs(expected).max(initial=0)
    np.testing.assert_array_less(error, bound + 1e-30)


SILU, SWIGLUOAI = Activation("silu"), Activation("swigluoai")
