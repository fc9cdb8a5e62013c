"""Decoding of MXFP4: two E2M1 numbers per byte, a power of two for every 32 of them (spec 7.8, hf_families 7.2)."""

import functools

import numpy as np
from jaxtyping import Float, UInt8

GROUP = 32
"""Numbers that share a scale."""
GROUP_BYTES = GROUP // 2
E2M1_VALUES: np.ndarray = np.array(
    [sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], np.float32
)
"""[16] float32: the number that each code stands for; bit 3 is the sign."""

_STEP_BYTES = 1 << 18


@functools.cache
def _pairs(dtype: np.dtype) -> np.ndarray:
    """[256 * 256]: at 256 * scale byte + data byte, the two numbers side by side as one unsigned integer."""
    data = np.arange(256, dtype=np.uint8)
    values = E2M1_VALUES[np.stack((data & 15, data >> 4), axis=-1)]  # even element in the low nibble
    exponents = np.arange(256, dtype=np.int32) - 127
    with np.errstate(over="ignore"):
        scaled = np.ldexp(values[None], exponents[:, None, None]).astype(dtype)
    return np.ascontiguousarray(scaled).view(f"u{2 * dtype.itemsize}").reshape(-1)


def decode_mxfp4(
    blocks: UInt8[np.ndarray, "rows groups 16"],
    scales: UInt8[np.ndarray, "rows groups"],
    out: Float[np.ndarray, "rows columns"],
) -> None:
    """Decode whole rows into `out`, `columns = 32 * groups`.

    Args:
        blocks: Element i of a row is in byte `(i % 32) // 2` of group `i // 32`; the even one of two is the low nibble.
        scales: Exponents plus 127.
        out: Where the numbers go, in any float dtype; C-contiguous. bfloat16 and float32 hold every number exactly.
    """
    table = _pairs(out.dtype)
    pairs = out.view(table.dtype).reshape(blocks.shape)
    rows, groups = scales.shape
    step = max(1, _STEP_BYTES // max(groups * GROUP_BYTES, 1))
    for start in range(0, rows, step):
        index = scales[start : start + step, :, None].astype(np.intp) << 8
        np.take(table, index | blocks[start : start + step], out=pairs[start : start + step], mode="clip")
