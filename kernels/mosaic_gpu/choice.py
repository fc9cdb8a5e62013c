"""Which kernel and which tiles compute a grouped matmul on a device, and why: from static shapes alone.

A tuned entry for the very shape comes first, if its tiles have room for the result, then the analytic default.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..device import GpuDevice
from . import stream_tiles
from .blackwell_row_tiles import default_blackwell_row_tiles
from .blackwell_weights_gradient_tiles import default_blackwell_weights_gradient_tiles
from .row_tiles import default_row_tiles
from .tiles import StreamTiles
from .tuning import KernelShape, Tuned, rows_bucket, tuned_tiles
from .weights_gradient_tiles import default_weights_gradient_tiles

STREAM_MOST_MEAN_ROWS = 16
"""Up to so many rows per group on average, weights are streamed past the rows; beyond, rows are tiled."""


@dataclasses.dataclass(frozen=True)
class ChosenTiles:
    """Tile sizes, and where they come from."""

    tiles: Any
    """Of the kind that the kernel takes."""
    reason: str


def is_blackwell(device: GpuDevice) -> bool:
    """Whether a device multiplies with tcgen05 instead of wgmma."""
    return device.compute_capability[0] == 10


def streams_weights(num_rows: int, num_groups: int, device: GpuDevice) -> bool:
    """Whether the rows per group are so few that weights should be streamed past them."""
    return not is_blackwell(device) and num_rows <= STREAM_MOST_MEAN_ROWS * num_groups


def choose_tiles(
    kernel: Literal["rows", "rows_gradient", "stream", "weights_gradient"],
    *,
    num_rows: int,
    num_groups: int,
    width_in: int,
    width_out: int,
    projections: int = 1,
    dtype: jnp.dtype,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> ChosenTiles:
    """The tiles for a kernel and its static shapes: the tuned ones for this device, or the analytic default."""
    shape = KernelShape(
        groups=num_groups,
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        dtype=dtype.name,
        rows_bucket=rows_bucket(num_rows, num_groups),
    )
    tuned = tuned_tiles(kernel, shape, device.name)
    if tuned is None:
        untuned = f"no tuned entry of {device.name} for {shape}"
    else:
        untuned = _no_room_for_result(tuned, projections, dtype, jnp.dtype(output_dtype), device)
        if untuned is None:
            return ChosenTiles(tuned.tiles, tuned.source)
    itemsize, output_itemsize = dtype.itemsize, jnp.dtype(output_dtype).itemsize
    sizes = (num_rows, num_groups, width_in, width_out, projections, itemsize, device)
    if kernel == "weights_gradient" and is_blackwell(device):
        tiles = default_blackwell_weights_gradient_tiles(num_groups, width_out, width_in, itemsize, device)
    elif kernel == "weights_gradient":
        tiles = default_weights_gradient_tiles(
            num_rows, num_groups, width_out, width_in, itemsize, output_itemsize, device
        )
    elif kernel == "stream":
        tiles = stream_tiles.default_stream_tiles(*sizes, output_itemsize)
    elif is_blackwell(device):
        tiles = default_blackwell_row_tiles(*sizes)
    else:
        tiles = default_row_tiles(num_rows, num_groups, width_out, projections, itemsize, device)
    return ChosenTiles(tiles, f"analytic default, {untuned}")


def _no_room_for_result(
    tuned: Tuned, projections: int, dtype: jnp.dtype, output_dtype: jnp.dtype, device: GpuDevice
) -> str | None:
    """Why tuned tiles cannot be used for a wider result than they were measured with, that of the operands' dtype, or None.

    Only `stream_kernel.py` holds a tile of the result in shared memory.
    """
    tiles = tuned.tiles
    if not isinstance(tiles, StreamTiles):
        return None
    measured, needed = (
        stream_tiles.shared_memory_bytes(tiles, projections, dtype.itemsize, result.itemsize)
        for result in (dtype, output_dtype)
    )
    if not measured <= device.shared_memory_bytes < needed:
        return None
    return (
        f"{tuned.source} needs {needed} bytes of shared memory with a {output_dtype} result, {device.name} has"
        f" {device.shared_memory_bytes}"
    )
