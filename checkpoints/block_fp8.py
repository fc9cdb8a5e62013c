"""Decoding of block FP8: float8_e4m3fn numbers, each block of which has one multiplier.

`W[n, k] = q[n, k] * scale_inv[n // block_rows, k // block_columns]`: the name notwithstanding, the scale multiplies.
The last block of either axis may be ragged. The product is taken in float32 and rounded once. Source: spec 7.2b,
hf_families 7.1.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

E4M3_VALUES: np.ndarray = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""[256] float32: the number that each byte stands for."""

_STEP_BYTES = 1 << 18
"""Numbers decoded at a time, so that the indices stay in the cache."""


def scale_values(scales: np.ndarray) -> Float[np.ndarray, "..."]:
    """Stored multipliers as float32; float8_e8m0fnu and its raw bytes mean 2**(byte - 127), 255 is NaN."""
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.astype(np.float32)


def decode_block_fp8(
    weights: UInt8[np.ndarray, "rows columns"],
    scales: Float[np.ndarray, "block_rows block_columns"],
    block: tuple[int, int],
    out: Float[np.ndarray, "rows columns"],
    first_row: int = 0,
) -> None:
    """Decode consecutive rows of a matrix into `out`.

    Args:
        weights: The bytes of rows `first_row`, `first_row + 1`, ... of the matrix.
        scales: float32 multipliers of the whole matrix.
        block: Rows and columns per multiplier.
        out: Where the numbers go, in any float dtype; C-contiguous.
        first_row: Row of the matrix that `weights` begins with.
    """
    rows, columns = weights.shape
    block_rows, block_columns = block
    table_offsets = np.arange(columns, dtype=np.intp) // block_columns * 256
    step = max(1, _STEP_BYTES // max(columns, 1))
    bits = out.view(f"u{out.dtype.itemsize}")
    start = 0
    while start < rows:
        block_row = (first_row + start) // block_rows
        stop_of_block = min(rows, (block_row + 1) * block_rows - first_row)
        # All 256 products of a block are worked out once; decoding is then a table look-up.
        with np.errstate(over="ignore"):
            table = (scales[block_row][:, None] * E4M3_VALUES).astype(out.dtype).view(bits.dtype).reshape(-1)
        while start < stop_of_block:
            stop = min(start + step, stop_of_block)
            np.take(table, weights[start:stop] + table_offsets, out=bits[start:stop], mode="clip")
            start = stop
