"""Sharded arrays that are filled block by block, so that host memory never holds more than a block."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from moe_jax.device_layouts import Home, on_device, sharding_of, write_in_place, zeros

BLOCK_BYTES = 256 * 2**20
"""Most bytes of a stacked array that are read at once, unless one row of one layer is larger."""

Index = tuple[slice, ...]
"""One slice per axis, with start and stop given."""

Bounds = tuple[tuple[int, int], ...]
"""Start and stop per axis."""

DevicesOf = dict[Bounds, list[Any]]
"""Bounds of a shard -> the devices that hold it."""


def assemble(
    shape: tuple[int, ...],
    home: Home,
    dtype: np.dtype,
    read: Callable[[Index], np.ndarray],
    *,
    stacked: bool,
    block_bytes: int = BLOCK_BYTES,
) -> jax.Array:
    """An array on the devices of `home`, of which this host fills its own shards.

    Args:
        shape: shape of the whole array.
        home: where its shards live. A shard that several devices hold is read once.
        dtype: what `read` returns.
        read: values of a part of the array.
        stacked: axis 0 counts layers, which may be read one after another, and of large ones the rows of axis 1.
            Otherwise a shard is read as a whole.
        block_bytes: most bytes to read at once.
    """
    sharding = sharding_of(home)
    devices_of: DevicesOf = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)

    shards = []
    for bounds, together in _read_together(devices_of, stacked=stacked):
        blocks = list(split_into_blocks(bounds, dtype.itemsize, block_bytes)) if stacked else [bounds]
        shards += _fill(blocks, together, dtype, read, home)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_together(devices_of: DevicesOf, *, stacked: bool) -> Iterator[tuple[Bounds, DevicesOf]]:
    """Groups of shards to read at once, each with the bounds that it fills without a gap.

    Shards of a stacked array that are slices of the same rows go together: a file holds whole rows, and would otherwise
    be read once for each of them.
    """
    groups: dict[Bounds, DevicesOf] = {}
    for bounds, devices in devices_of.items():
        groups.setdefault(bounds[:2] if stacked else bounds, {})[bounds] = devices
    for group in groups.values():
        union = tuple(
            (min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in zip(*group, strict=True)
        )
        if sum(map(_size, group)) == _size(union):
            yield union, group
        else:
            yield from ((bounds, {bounds: devices}) for bounds, devices in group.items())


def _size(bounds: Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


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
    blocks: list[Bounds], devices_of: DevicesOf, dtype: np.dtype, read: Callable[[Index], np.ndarray], home: Home
) -> list[jax.Array]:
    """A shard on every device; `blocks` hold all the values of all of them."""
    shards: dict[Any, jax.Array] = {}
    for block in blocks:
        values = read(_index(block))
        for bounds, devices in devices_of.items():
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, bounds, strict=True))
            part = values[_index(_relative(common, block))]
            for device in devices:
                if common == bounds:
                    shards[device] = jax.device_put(part, on_device(home, device))
                    continue
                if device not in shards:
                    shape = tuple(stop - start for start, stop in bounds)
                    shards[device] = zeros(shape, dtype, on_device(home, device))
                offsets = tuple(start for start, _ in _relative(common, bounds))
                shards[device] = write_in_place(shards[device], part, offsets)
    return list(shards.values())


def _relative(bounds: Bounds, to: Bounds) -> Bounds:
    """The same bounds, counted from the starts of `to`."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(bounds, to, strict=True))


def _index(bounds: Bounds) -> Index:
    return tuple(slice(start, stop) for start, stop in bounds)
