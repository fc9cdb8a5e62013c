"""A panel of columns: what the kernel on rows (`rows_kernel.py`) multiplies by code of its own.

Strips of a panel follow each other, so that one is activated and stored while the next is multiplied. How the products of a strip
are written decides what the compiler keeps of long rows, which don't fit into registers (`limits.REREADING`,
`limits.contracted_at_once`).
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from ..activations import Activation
from ..device import TpuDevice
from .epilogue import activate
from .limits import LANES, contracted_at_once, panel_columns, strip_columns
from .shared_rows import aligned
from .tiles import RowTiles

Ref = Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static in the body of the kernel."""

    tiles: RowTiles
    projections: int
    contract: Literal["in", "out"]
    activation: Activation | None
    depth: int
    """Of the contraction."""
    padded_out: int
    """Columns of the result, and of its padding."""
    itemsize: int
    """Bytes of an operand's element."""
    device: TpuDevice

    @property
    def panel(self) -> int:
        """Columns of a panel; the last one of a tile may have fewer."""
        return panel_columns(self.tiles.columns, self.projections, self.depth)

    @property
    def strip(self) -> int:
        """Columns of a strip; the last one of a panel may have fewer."""
        return strip_columns(self.panel, self.projections, self.device)

    @property
    def products(self) -> int:
        """Of the same rows in a panel: by each projection's strips."""
        return self.projections * pl.cdiv(self.panel, self.strip)

    @property
    def last_columns(self) -> int:
        """Columns of the last tile."""
        return self.padded_out - (pl.cdiv(self.padded_out, self.tiles.columns) - 1) * self.tiles.columns


class Operands(NamedTuple):
    """What a visit computes with, in vector memory."""

    rows: Ref
    weights: Ref
    bias: Ref | None
    scale: Callable[[Array, int], Float[Array, "size 1"]] | None
    """Factors of a number of rows, from a row of the visit on."""
    zeros: Ref | None
    """One for each product of a panel, in scalar memory: the compiler doesn't know what they are. See `limits.REREADING`."""


def multiply_panel(
    problem: Problem,
    operands: Operands,
    buffer: Ref,
    first_row: Array,
    size: int,
    first_column: Array | int,
    columns: int,
) -> None:
    """The results of `size` rows and `columns` columns, strip by strip."""
    own_rows = pl.ds(first_row, size)
    # A product of float32 splits its rows into parts of bfloat16, which is done once for all products.
    split_rows = operands.rows[own_rows, : problem.depth] if problem.itemsize == 4 else None
    scale = None if operands.scale is None else operands.scale(first_row, size)
    for strip, start in enumerate(range(0, columns, problem.strip)):
        own_columns = _columns(first_column, start, min(problem.strip, columns - start))
        projected = []
        for projection in range(problem.projections):
            product = strip * problem.projections + projection
            rows = _rows_of_product(operands, first_row, size, product) if split_rows is None else split_rows
            values = _product(problem, rows, operands.weights.at[projection], own_columns)
            if operands.bias is not None:
                values = values + operands.bias[projection, own_columns][None, :]
            projected.append(values)
            if buffer.shape[0] > 1:
                buffer[1 + projection, own_rows, own_columns] = values.astype(buffer.dtype)
        values = activate(problem.activation, projected)
        if scale is not None:
            values = values * scale
        buffer[0, own_rows, own_columns] = values.astype(buffer.dtype)


def _rows_of_product(operands: Operands, first_row: Array, size: int, product: int) -> Ref:
    """`size` rows from `first_row` on, as one product of a panel reads them."""
    first = first_row if operands.zeros is None else first_row + operands.zeros[product]
    return operands.rows.at[aligned(first, size)]


def _product(problem: Problem, rows: Ref | Array, weights: Ref, columns: Any) -> Float[Array, "size columns"]:
    """Rows times `columns` of a projection's weights, in float32."""
    # One pass of a matrix unit rounds float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else lax.Precision.DEFAULT
    at_once = contracted_at_once(rows.shape[0], problem.depth, problem.itemsize, problem.device)

    def product_of(start: int) -> Float[Array, "size columns"]:
        piece = slice(start, min(start + at_once, problem.depth))
        matrix, contracted = (weights[columns, piece], 1) if problem.contract == "in" else (weights[piece, columns], 0)
        return lax.dot_general(
            rows[:, piece],
            matrix,
            (((1,), (contracted,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    return functools.reduce(operator.add, map(product_of, range(0, problem.depth, at_once)))


def _columns(first: Array | int, start: int, size: int) -> Any:
    """The slice of `size` columns, `start` after `first`, both multiples of 128."""
    return pl.ds(first + start if isinstance(first, int) else pl.multiple_of(first + start, LANES), size)
