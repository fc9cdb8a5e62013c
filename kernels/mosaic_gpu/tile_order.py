"""The order in which the blocks of a kernel work on its tiles, unless a kernel says otherwise.

Of P blocks, block b takes the tiles b, P + b, 2P + b, … so blocks work on neighbouring tiles at any time, and the order of all
tiles decides what these share in the L2 cache.
"""

from collections.abc import Callable

from jax import Array, lax

BLOCK = "multiprocessor"
"""Axis of the kernels' grids: there is one block per multiprocessor."""


def num_own(total: Array | int, num_blocks: int) -> Array:
    """How many of `total` tiles this block computes."""
    return lax.div(total - lax.axis_index(BLOCK) + num_blocks - 1, num_blocks)


def own_position(turn: Array, num_blocks: int) -> Array:
    """Which of all tiles this block computes in its turn."""
    return lax.axis_index(BLOCK) + turn * num_blocks


def place_in_panels(
    position: Array, panel: int, num_columns: int, height: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Row and column of a position: panels of rows one after the other, column by column within a panel.

    Neighbours within a panel share a column or a row.

    Args:
        position: not negative.
        panel: rows of a panel.
        num_columns: columns of every row.
        height: rows of the panel with an index: those that are left, at most `panel`.
    """
    which = lax.div(position, panel * num_columns)
    within = position - which * (panel * num_columns)
    rows = height(which)
    column = lax.div(within, rows)
    return which * panel + within - column * rows, column
