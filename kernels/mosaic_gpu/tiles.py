"""Tile sizes of the kernels: hashable data, checked against what the hardware can hold."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from ..device import GpuDevice


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTiles:
    """Tile sizes of the kernels that multiply rows by their group's matrix (`rows_product.py`): many rows per group."""

    rows: int
    """Rows of a tile: 128, or on Hopper also 64, where both warpgroups share them and split the columns."""
    columns: int
    """Output columns of a tile, of gate and of up each."""
    depth: int
    """Elements of the contracted dimension per step of the pipeline."""
    stages: int
    """Steps that are in shared memory at once."""
    panel: int
    """Tiles of rows that are worked on side by side, so that they share weights in the L2 cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamTiles:
    """Tile sizes of the kernel that streams weights past few rows (`stream_kernel.py`): decoding."""

    rows: int
    """Rows of a tile: 8, 16, 32 or 64, the narrow side of the multiplication."""
    columns: int
    """Output columns of a tile, of gate and of up each: a multiple of 64, the side on which weights are multiplied."""
    depth: int
    """Elements of the contracted dimension per step of the pipeline."""
    stages: int
    """Steps that are in flight at once."""
    splits: int
    """Parts into which the contracted dimension is split, for when there are fewer tiles than multiprocessors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsGradientTiles:
    """Tile sizes of the kernels that multiply transposed rows with rows, group by group (`weights_gradient_product.py`)."""

    out_columns: int
    """Columns of the cotangent, rows of the gradient."""
    in_columns: int
    """Columns of the rows, columns of the gradient."""
    depth: int
    """Rows per step of the pipeline."""
    stages: int
    """Steps that are in shared memory at once."""
    panel: int
    """Tiles along `out_columns` that are worked on side by side, so that they share rows in the L2 cache."""


SomeTiles = TypeVar("SomeTiles", RowTiles, StreamTiles, WeightsGradientTiles)


def check_shared_memory(tiles: RowTiles | StreamTiles | WeightsGradientTiles, needed: int, device: GpuDevice) -> None:
    """Refuse tiles with which a block needs more bytes of shared memory than it can have.

    Raises:
        ValueError: says how many these are.
    """
    if needed > device.shared_memory_bytes:
        raise ValueError(
            f"{tiles} needs {needed} bytes of shared memory, {device.name} has {device.shared_memory_bytes}"
        )


def with_fitting_stages(tiles: SomeTiles, needed: Callable[[SomeTiles], int], device: GpuDevice) -> SomeTiles:
    """`tiles` with as many of its stages as fit into shared memory, though at least 2; `needed` says what tiles need."""
    while tiles.stages > 2 and needed(tiles) > device.shared_memory_bytes:
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
    return tiles
