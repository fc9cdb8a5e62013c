"""A panel of columns: what the kernel on rows (`rows_kernel.py`) multiplies by code of its own.

Strips of a panel follow each other, so that one is activated and stored while the next is multiplied. How the products of a strip
are written decides what the compiler keeps of long rows, which don't fit into registers (`limits.REREADING`,
`limits.contracted_at_once`).
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from ..activations import Activation
from ..device import TpuDevice
from .epilogue import activate
from .limits import LANES, LONE_STRIP_PIECE, contracted_at_once, has_lone_strips, panel_columns, strip_columns
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
        return panel_columns(self.tiles.columns, self.projections, self.depth, lone_strips=self.has_lone_strips)

    @property
    def strip(self) -> int:
        """Columns of a strip; the last one of a panel may have fewer."""
        return strip_columns(self.panel, self.projections, self.device)

    @property
    def has_lone_strips(self) -> bool:
        """Whether a panel is one strip, and rows are multiplied by that of all projections at once."""
        return self.contract == "in" and has_lone_strips(self.depth, self.itemsize, self.device)

    @property
    def products(self) -> int:
        """Of the same rows in a panel: by each projection's strips."""
        return self.projections * pl.cdiv(self.panel, self.strip)

    def contracted_at_once(self, size: int) -> int:
        """Columns of `size` rows that one product takes."""
        if self.has_lone_strips:
            return LONE_STRIP_PIECE
        return contracted_at_once(size, self.depth, self.itemsize, self.device)

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

    def rows_of(product: int) -> Ref | Array:
        return _rows_of_product(operands, first_row, size, product) if split_rows is None else split_rows

    for strip, start in enumerate(range(0, columns, problem.strip)):
        own_columns = _columns(first_column, start, min(problem.strip, columns - start))
        if problem.has_lone_strips:
            products = _product_of_all(problem, rows_of(0), operands.weights, own_columns)
        else:
            first = strip * problem.projections
            products = [
                _product(problem, rows_of(first + projection), operands.weights.at[projection], own_columns)
                for projection in range(problem.projections)
            ]
        projected = []
        for projection, values in enumerate(products):
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
    if problem.contract == "in":
        return _sum_of_pieces(problem, rows, lambda piece: weights[columns, piece], contracted=1)
    return _sum_of_pieces(problem, rows, lambda piece: weights[piece, columns], contracted=0)


def _product_of_all(
    problem: Problem, rows: Ref | Array, weights: Ref, columns: Any
) -> Sequence[Float[Array, "size columns"]]:
    """Rows times `columns` of each projection's (out, in) weights, in float32: one product by all of them side by side."""

    def side_by_side(piece: slice) -> Float[Array, "P*columns piece"]:
        matrices = weights[:, columns, piece]
        return matrices.reshape(-1, matrices.shape[-1])

    return jnp.split(_sum_of_pieces(problem, rows, side_by_side, contracted=1), problem.projections, axis=1)


def _sum_of_pieces(
    problem: Problem, rows: Ref | Array, matrix: Callable[[slice], Array], *, contracted: int
) -> Float[Array, "size columns"]:
    """Products by pieces of the contraction, summed in float32.

    Args:
        problem: says how large pieces are.
        rows: with the contraction whole.
        matrix: those parts of the weights, for a piece.
        contracted: which axis of them is.
    """
    # One pass of a matrix unit rounds float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else lax.Precision.DEFAULT
    at_once = problem.contracted_at_once(rows.shape[0])

    def product_of(start: int) -> Float[Array, "size columns"]:
        piece = slice(start, min(start + at_once, problem.depth))
        return lax.dot_general(
            rows[:, piece],
            matrix(piece),
            (((1,), (contracted,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    return functools.reduce(operator.add, map(product_of, range(0, problem.depth, at_once)))


def _columns(first: Array | int, start: int, size: int) -> Any:
    """The slice of `size` columns, `start` after `first`, both multiples of 128."""
    return pl.ds(first + start if isinstance(first, int) else pl.multiple_of(first + start, LANES), size)
