"""Storing part of a tile's rows: copies to memory have sizes fixed at compile time, the number of rows is known at run time."""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .ref import Ref
from .schedule import ROW_ALIGNMENT


def swizzled(dtype: jnp.dtype, tile_rows: int = ROW_ALIGNMENT, swizzle_bytes: int = 128) -> tuple[plgpu.Transform, ...]:
    """Layout of a shared-memory buffer as tensor cores and bulk copies want it.

    Rows of `swizzle_bytes` bytes, swizzled, lie one after the other whether they are tiled by 8 rows or by one; the latter
    can be sliced at any row, the former at multiples of 8.
    """
    columns = swizzle_bytes // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((tile_rows, columns))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle_bytes)  # pyright: ignore[reportAbstractUsage]


def store_rows(
    source: Ref,
    destination: Ref,
    *,
    row: Array,
    first: Array | int,
    last: Array,
    column: Array,
    exact_rows: bool,
) -> None:
    """Start copying rows `first : last` of `source` (shared memory) to `row + first : row + last` of `destination`.

    Up to one copy for each power of two; one copy for a full tile. Does not commit the group of copies.

    Args:
        source: [rows, columns]; rows a power of two.
        destination: [M, N] in global memory; what would lie beyond it is left out.
        row: multiple of 8.
        first: with `exact_rows` any, otherwise 0.
        last: with `exact_rows` any; otherwise it is rounded up to a multiple of 8.
        column: first column of the destination.
        exact_rows: whether single rows count.
    """
    size, columns = source.shape
    step = 1 if exact_rows else ROW_ALIGNMENT
    if not exact_rows:
        last = (last + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    count = jnp.clip(last, 0, size) - jnp.clip(first, 0, size)
    start = jnp.clip(first, 0, size)
    if columns == destination.shape[-1]:
        # The index of an axis that is one copy wide is left out: what is beyond it would be stored at its beginning.
        count = jnp.where(column == 0, count, 0)

    while size >= step:
        taken = jnp.bitwise_and(count, size)

        @pl.when(taken != 0)
        def _(start=start, size=size):
            begin = start if exact_rows else pl.multiple_of(start, ROW_ALIGNMENT)
            plgpu.copy_smem_to_gmem(
                source.at[pl.ds(begin, size)],
                destination.at[pl.ds(row + begin, size), pl.ds(column, columns)],
                commit_group=False,
            )

        start = start + taken
        size //= 2
