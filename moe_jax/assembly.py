"""Sharded arrays that are filled block by block, so that host memory never holds more than a block."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

BLOCK_BYTES = 256 * 2**20
"""Most bytes of a stacked array that are read at once, unless one row of one layer is larger."""

Index = tuple[slice, ...]
"""One slice per axis, with start and stop given."""

Bounds = tuple[tuple[int, int], ...]
"""Start and stop per axis."""


def assemble(
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: np.dtype,
    read: Callable[[Index], np.ndarray],
    *,
    stacked: bool,
    block_bytes: int = BLOCK_BYTES,
) -> jax.Array:
    """An array on the devices of `sharding`, of which this host fills its own shards.

    Args:
        shape: shape of the whole array.
        sharding: where its shards live. A shard that several devices hold is read once.
        dtype: what `read` returns.
        read: values of a part of the array.
        stacked: axis 0 counts layers, which may be read one after another, and of large ones the rows of axis 1.
            Otherwise a shard is read as a whole.
        block_bytes: most bytes to read at once.
    """
    devices_of: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)

    shards = []
    for bounds, devices in devices_of.items():
        blocks = list(split_into_blocks(bounds, dtype.itemsize, block_bytes)) if stacked else [bounds]
        shards += _fill(bounds, blocks, devices, dtype, read)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def split_into_blocks(bounds: Bounds, itemsize: int, block_bytes: int) -> Iterator[Bounds]:
    """Split a part of a stacked array into runs of layers, or runs of rows of one layer, of at most `block_bytes`."""
    (first, last), (first_row, last_row), *features = bounds
    row_bytes = itemsize * math.prod(stop - start for start, stop in features)
    layer_bytes = row_bytes * (last_row - first_row)
    if layer_bytes <= block_bytes:
        layers = block_bytes // layer_bytes if layer_bytes else last - first
        for start in range(first, last, max(1, layers)):
            yield ((start, min(start + layers, last)), (first_row, last_row), *features)
        return
    rows = max(1, block_bytes // row_bytes)
    for layer in range(first, last):
        for start in range(first_row, last_row, rows):
            yield ((layer, layer + 1), (start, min(start + rows, last_row)), *features)


def _fill(
    bounds: Bounds,
    blocks: list[Bounds],
    devices: list[Any],
    dtype: np.dtype,
    read: Callable[[Index], np.ndarray],
) -> list[jax.Array]:
    """One shard on each of `devices`, with equal values."""
    if blocks == [bounds]:
        values = read(_index(bounds))
        return [jax.device_put(values, device) for device in devices]
    shape = tuple(stop - start for start, stop in bounds)
    shards = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for block in blocks:
        values = read(_index(block))
        offsets = tuple(start - first for (start, _), (first, _) in zip(block, bounds, strict=True))
        shards = [_write(shard, values, offsets) for shard in shards]
    return shards


def _index(bounds: Bounds) -> Index:
    return tuple(slice(start, stop) for start, stop in bounds)


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, values: np.ndarray, offsets: tuple[int, ...]) -> jax.Array:
    """`shard` with `values` at `offsets`; its memory is reused."""
    return jax.lax.dynamic_update_slice(shard, values, offsets)
