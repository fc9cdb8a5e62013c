"""The tile sizes that are worth measuring for a shape: those that the kernel accepts and that fill the shared memory."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from ..device import GpuDevice
from .blackwell_row_tiles import check_blackwell_row_tiles
from .blackwell_weights_gradient_tiles import check_blackwell_weights_gradient_tiles
from .choice import is_blackwell
from .row_tiles import check_row_tiles
from .stream_tiles import check_stream_tiles
from .tiles import RowTiles, StreamTiles, WeightsGradientTiles
from .tuning import TILES_OF_KERNEL, KernelShape, Tiles
from .weights_gradient_tiles import check_weights_gradient_tiles

MOST_STAGES = 8
"""More never fit beside tiles that are worth trying."""
PANELS = (1, 4, 8, 16)


def candidates(kernel: str, shape: KernelShape, device: GpuDevice) -> tuple[Tiles, ...]:
    """Tile sizes worth measuring, each of which the kernel accepts on `device`.

    Every size of tile has as many stages as fit; tiles of the kernels that are short of registers also come with one less.

    Args:
        kernel: a name in `tuning.TILES_OF_KERNEL`.
        shape: what they are to be used for; sizes that reach far beyond it are left out.
        device: see `GpuDevice`.

    Raises:
        ValueError: unknown kernel.
    """
    if kernel not in TILES_OF_KERNEL:
        raise ValueError(f"unknown kernel {kernel!r}; legal are {', '.join(TILES_OF_KERNEL)}")
    found: list[Tiles] = []
    for tiles in _GRIDS[kernel](shape, device):
        staged = (dataclasses.replace(tiles, stages=stages) for stages in range(MOST_STAGES, 1, -1))
        fitting = (tiles for tiles in staged if _is_accepted(tiles, shape, device))
        found.extend(itertools.islice(fitting, 1 if kernel == "stream" else 2))
    return tuple(found)


def check_tiles(tiles: Tiles, shape: KernelShape, device: GpuDevice) -> None:
    """Refuse tiles that their kernel cannot use for this shape on this device.

    Raises:
        ValueError: says which limit was hit.
    """
    itemsize = jnp.dtype(shape.dtype).itemsize
    match tiles:
        case RowTiles() if is_blackwell(device):
            check_blackwell_row_tiles(tiles, shape.projections, itemsize, device)
        case RowTiles():
            check_row_tiles(tiles, shape.projections, itemsize, device)
        case StreamTiles():
            check_stream_tiles(tiles, shape.projections, shape.width_in, itemsize, device)
        case WeightsGradientTiles() if is_blackwell(device):
            check_blackwell_weights_gradient_tiles(tiles, itemsize, device)
        case WeightsGradientTiles():
            check_weights_gradient_tiles(tiles, itemsize, device)


def _is_accepted(tiles: Tiles, shape: KernelShape, device: GpuDevice) -> bool:
    try:
        check_tiles(tiles, shape, device)
    except ValueError:
        return False
    return True


def _rows(shape: KernelShape, device: GpuDevice) -> Iterator[Tiles]:
    widest = 256 // shape.projections
    # 192 columns fill their last tile where 256 leave much of it empty: for 2880 of them, say.
    widths = (64, 128, 256) if is_blackwell(device) else (64, 128, 192, 256)
    for rows, columns, depth, panel in itertools.product((64, 128), widths, (64, 128), PANELS):
        # With 64 rows the warpgroups split the columns, so that a tile may be twice as wide.
        if columns <= min(widest * 128 // rows, _rounded_up(shape.width_out)) and depth <= _rounded_up(shape.width_in):
            yield RowTiles(rows=rows, columns=columns, depth=depth, stages=MOST_STAGES, panel=panel)


def _stream(shape: KernelShape, device: GpuDevice) -> Iterator[Tiles]:  # noqa: ARG001 - as all of `_GRIDS`
    # Tiles are used for routings of all kinds: groups of twice the mean are common, much larger ones take several tiles.
    fewest = min(64, max(8, shape.rows_bucket))
    sizes = [rows for rows in (8, 16, 32, 64) if fewest <= rows <= 4 * fewest]
    for rows, columns, depth, splits in itertools.product(sizes, (64, 128, 256), (64, 128, 256), (1, 2, 4, 8)):
        if columns <= _rounded_up(shape.width_out) and splits * depth <= _rounded_up(shape.width_in):
            yield StreamTiles(rows=rows, columns=columns, depth=depth, stages=MOST_STAGES, splits=splits)


def _weights_gradient(shape: KernelShape, device: GpuDevice) -> Iterator[Tiles]:  # noqa: ARG001 - as all of `_GRIDS`
    for out_columns, in_columns, panel in itertools.product((128, 256), (64, 128, 192, 256), PANELS):
        if out_columns <= max(128, _rounded_up(shape.width_out)) and in_columns <= _rounded_up(shape.width_in):
            yield WeightsGradientTiles(
                out_columns=out_columns, in_columns=in_columns, depth=64, stages=MOST_STAGES, panel=panel
            )


def _rounded_up(width: int) -> int:
    """To a multiple of 64, the least that a tile covers."""
    return -(-width // 64) * 64


_GRIDS: dict[str, Callable[[KernelShape, GpuDevice], Iterator[Tiles]]] = {
    "rows": _rows,
    "rows_gradient": _rows,
    "stream": _stream,
    "weights_gradient": _weights_gradient,
}
