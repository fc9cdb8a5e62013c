"""What the kernels cannot do. Apart from them, because asking must not import Pallas TPU, which takes half a second."""

import jax.numpy as jnp

from ..device import TPU_DEVICES, TpuDevice
from .rounding import ceil_div, round_up
from .tiles import RowTiles

LANES = 128
"""Columns of a vector register, and of a tile of device memory."""
RESERVED_VMEM_BYTES = 4 * 2**20
"""What is left to the compiler for temporaries and spilled registers."""
KEPT_ROWS_IN_RESERVE = 6 * 2**20
"""Bytes of rows that code keeps for which the reserve, and what is estimated too high, suffice: with more, the compiler ran out of
vector memory for v5p and v6e (Mixtral's rows of 14336 and 28672 elements)."""
STRIP = 256
"""Columns that the kernel on rows multiplies, activates and stores at once, as many as the widest matrix unit has; a panel's last
strip may have half of them. The scheduler activates one strip while the next is multiplied, and holds no more than a strip's
projections."""
REREADING = ("v5e", "v5p", "v6e")
"""Generations on which each product of a panel reads its rows of bfloat16 anew. There a tile of them that a kernel copies is half
a register. The compiler would put two together once for all products, and spill the long rows that it got; so each product reads
from where a scalar says that isn't known to be the same. A register of 7x is loaded at once, as is one of float32."""
PAIRED_STRIPS = ("7x",)
"""Generations whose matrix units multiply by a strip each at the same time. The results of both come together, and those of the
second are spilled until the first are stored, so a panel of no more than two is one strip."""
LONE_STRIPS = {"7x": 2048}
"""Generations on which a panel is one strip, of all projections together, where (out, in) matrices of two-byte elements are deeper
than that. Both matrix units then share the strip, each multiplying other parts of the contraction, and are fed at the same time;
with a strip each they are fed in turns, which takes a fifth longer. Where the contraction is short, the ends of panels, at which
nothing is multiplied, would take more than that saves. Matrices whose rows are contracted have no such turns: they need not be
transposed on their way into a matrix unit."""
LONE_STRIP_PIECE = 3 * 256
"""Of the contraction of a lone strip, how much one product takes: three times what a matrix unit holds. With these the compiler fed
both units together at every depth that was tried; with other multiples, or the whole contraction at once, only at some."""
PIECE_ELEMENTS = 2**15
"""Of rows that are multiplied at once where a strip is wider than a matrix unit: they take a quarter of the registers."""
MOST_PANEL_ELEMENTS = 2**22
"""Of weights that the kernel on rows multiplies by code of their own; a tile with more is a loop over panels of its columns. So
large that the ends of the loop's turns, at which nothing is multiplied, take a few per cent of the time, and so small that the
compiler takes seconds for the code."""


def unsupported_device(device: TpuDevice | None, platform: str) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if device is None:
        return f"it needs a TPU of {', '.join(TPU_DEVICES)}, the platform is {platform!r}"
    return None


def unsupported_operands(**dtypes: jnp.dtype) -> str | None:
    """Why arrays of these dtypes cannot be used, or None."""
    for name, dtype in dtypes.items():
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, got {dtype}"
    return None


def vmem_limit_bytes(device: TpuDevice) -> int:
    """What operands, results and the kernel's own buffers may take together."""
    return device.vmem_bytes - RESERVED_VMEM_BYTES


def compiler_vmem_limit_bytes(device: TpuDevice) -> int:
    """What a compiled kernel may take, the compiler's temporaries included."""
    return device.vmem_bytes


def has_lone_strips(depth: int, itemsize: int, device: TpuDevice) -> bool:
    """Whether a panel of the kernel on rows is one strip by (out, in) matrices, see `LONE_STRIPS`."""
    return itemsize == 2 and depth > LONE_STRIPS.get(device.name, depth)


def panel_columns(columns: int, projections: int, depth: int, *, lone_strips: bool) -> int:
    """Columns of a panel of the kernel on rows, of each projection; the last one of a tile may have fewer.

    A narrower last panel is code of its own; to do without it, a few more panels are worth it.
    """
    if lone_strips:
        return min(STRIP // projections, columns)
    fewest = ceil_div(projections * depth * columns, MOST_PANEL_ELEMENTS)
    for panels in range(fewest, fewest * 3 // 2 + 1):
        if columns % (panels * STRIP) == 0 or panels == 1:
            return columns // panels
    return round_up(ceil_div(columns, fewest), STRIP)


def rereads_rows(itemsize: int, device: TpuDevice) -> bool:
    """Whether each product of a panel reads its rows anew, see `REREADING`."""
    return device.name in REREADING and itemsize == 2


def strip_columns(panel: int, projections: int, device: TpuDevice) -> int:
    """Columns of a strip of the kernel on rows, of each projection; the last one of a panel may have fewer."""
    if device.name in PAIRED_STRIPS and panel * projections <= 2 * STRIP:
        return panel
    return min(STRIP, panel)


def contracted_at_once(size: int, depth: int, itemsize: int, device: TpuDevice) -> int:
    """Of `depth` columns, how many of `size` rows the kernel on rows multiplies at once.

    By a strip wider than a matrix unit rows are multiplied twice: by one half in one unit, by the other in another one. In pieces
    that all units hold together, or a few times as much of few rows, they are read for both; otherwise they would be spilled.
    """
    if device.mxu_size >= STRIP or not rereads_rows(itemsize, device):
        return depth
    all_units = 2 * device.mxu_size
    return max(1, PIECE_ELEMENTS // (size * all_units)) * all_units


def rows_vmem_bytes(
    tiles: RowTiles,
    *,
    width_in: int,
    projections: int,
    kept: bool,
    scaled_rows: int,
    itemsize: int,
    output_itemsize: int,
    device: TpuDevice,
) -> int:
    """Vector memory that the kernel on rows takes: everything twice, so that copies overlap with products."""
    depth = round_up(width_in, LANES)
    parts = 1 + (projections if kept else 0)
    rows = 2 * tiles.rows * depth * itemsize
    weights = 2 * projections * tiles.columns * depth * itemsize
    results = (2 * tiles.rows + 16 * tiles.column_tiles) * parts * tiles.columns * output_itemsize
    bias = 2 * 8 * tiles.columns * 4
    scale = (tiles.rows + LANES) * LANES * 4 + 2 * 4 * round_up(scaled_rows + tiles.rows + LANES, LANES * 8)
    # A strip's products, and what the compiler keeps of them.
    temporaries = 4 * tiles.chunk * projections * 256 * 4
    # Code that multiplies more than a chunk of rows keeps them; there is other code for a last panel with fewer columns.
    lone_strips = has_lone_strips(depth, itemsize, device)
    panel = panel_columns(tiles.columns, projections, depth, lone_strips=lone_strips)
    different_panels = 1 if panel >= tiles.columns else 1 + (tiles.columns % panel > 0)
    longer_than_chunk = max((size for size in tiles.remainders if size > tiles.chunk), default=0)
    kept_rows = different_panels * longer_than_chunk * depth * itemsize
    beyond_reserve = max(0, kept_rows - KEPT_ROWS_IN_RESERVE)
    return rows + weights + results + bias + (scale if scaled_rows else 0) + temporaries + beyond_reserve


def check_row_tiles(tiles: RowTiles, device: TpuDevice, needed_bytes: int) -> None:
    """Whether tile sizes fit each other and the device.

    Raises:
        ValueError: they don't; says which limit was hit.
    """
    if tiles.columns < LANES or tiles.columns % LANES:
        raise ValueError(f"columns of a tile must be a multiple of {LANES}, got {tiles.columns}")
    if tiles.chunk < LANES or tiles.chunk % LANES:
        raise ValueError(f"chunk must be a multiple of {LANES}, got {tiles.chunk}")
    if tiles.rows < tiles.chunk or tiles.rows % tiles.chunk:
        raise ValueError(f"rows of a tile must be a multiple of chunk={tiles.chunk}, got {tiles.rows}")
    if tiles.remainder < 16 or tiles.remainder % 16 or tiles.chunk % tiles.remainder:
        raise ValueError(f"remainder must be a multiple of 16 that divides chunk={tiles.chunk}, got {tiles.remainder}")
    if not tiles.remainder <= tiles.least <= tiles.chunk or tiles.least % tiles.remainder:
        raise ValueError(
            f"least must be a multiple of remainder={tiles.remainder} up to chunk={tiles.chunk}, got {tiles.least}"
        )
    if tiles.most < tiles.chunk or tiles.most % tiles.remainder:
        raise ValueError(
            f"most must be a multiple of remainder={tiles.remainder} from chunk={tiles.chunk} on, got {tiles.most}"
        )
    if tiles.column_tiles < 1:
        raise ValueError(f"column_tiles must be at least 1, got {tiles.column_tiles}")
    if needed_bytes > vmem_limit_bytes(device):
        raise ValueError(
            f"{tiles} take {needed_bytes} bytes of vector memory, {device.name} has {vmem_limit_bytes(device)} to give"
        )
