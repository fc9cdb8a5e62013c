"""The 16 rows that a copy can address at least, as kernels take them: where visits begin and end, and what two of them share."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from .schedule import ROW_ALIGNMENT

Ref = Any


def aligned(start: Array, size: Array | int) -> Any:
    """The slice of `size` rows from `start` on, which is a multiple of 16."""
    return pl.ds(pl.multiple_of(start, ROW_ALIGNMENT), size)


def whole_rows(count: Array) -> Array:
    """`count` rows up to a multiple of 16."""
    return pl.multiple_of(lax.div(count + (ROW_ALIGNMENT - 1), ROW_ALIGNMENT) * ROW_ALIGNMENT, ROW_ALIGNMENT)


def mask_ends(buffer: Ref, shared_rows: Ref, first: Array, last: Array) -> None:
    """Put the visits before this one's results into the 16 rows that they share, and keep those that the next one shares.

    Args:
        buffer: the results of a visit, [..., rows, columns]; rows that are the group's keep what they hold, the others among
            the first and the last 16 become what visits before have kept, or zero.
        shared_rows: [..., 16, columns] of the same dtype: what was kept, zeros at first.
        first: first row of the visit that is the group's, 0 to 15.
        last: end of these rows.
    """
    row = lax.broadcasted_iota(jnp.int32, shared_rows.shape, len(shared_rows.shape) - 2)
    kept_as = jnp.float32  # masks of 16 rows are those of 32 bits

    @pl.when(first > 0)
    def _():
        own = buffer[..., :ROW_ALIGNMENT, :].astype(kept_as)
        before = shared_rows[...].astype(kept_as)
        buffer[..., :ROW_ALIGNMENT, :] = jnp.where(row < first, before, own).astype(buffer.dtype)

    end = lax.rem(last, ROW_ALIGNMENT)

    @pl.when(end > 0)
    def _():
        at = aligned(last - end, ROW_ALIGNMENT)
        own = jnp.where(row < end, buffer[..., at, :].astype(kept_as), 0).astype(buffer.dtype)
        buffer[..., at, :] = own
        shared_rows[...] = own
