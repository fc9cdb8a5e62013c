"""What the kernels cannot do. Apart from them, because asking must not import Mosaic GPU, which takes half a second."""

import jax.numpy as jnp

from ..device import GpuDevice

SWIZZLES = (128, 64, 32)
"""Bytes of a row that lie together in shared memory, best first."""
LEAST_WIDTH = SWIZZLES[-1] // 2
"""Elements of two bytes in the smallest of them."""


def unsupported_device(device: GpuDevice | None, platform: str) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if device is None:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or 10.x (Blackwell), the platform is {platform!r}"
    if device.compute_capability != (9, 0) and device.compute_capability[0] != 10:
        capability = ".".join(map(str, device.compute_capability))
        return f"it needs compute capability 9.0 (Hopper) or 10.x (Blackwell), {device.name} has {capability}"
    return None


def unsupported_operands(dtype: jnp.dtype, **widths: int) -> str | None:
    """Why operands of this dtype and these row lengths cannot be used, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"operands must be bfloat16 or float16 (tensor cores would round {dtype} to fewer bits), got {dtype}"
    for name, width in widths.items():
        if width % LEAST_WIDTH:
            return f"{name} must be a multiple of {LEAST_WIDTH}, for swizzled bulk copies, got {width}"
    return None


def swizzle_bytes(width: int, itemsize: int) -> int:
    """The widest swizzle of which rows of `width` elements are multiples.

    Bulk copies of swizzled tiles address global memory in such tiles; a width that is no multiple has no description to them.

    Raises:
        ValueError: there is none.
    """
    for swizzle in SWIZZLES:
        if width * itemsize % swizzle == 0:
            return swizzle
    raise ValueError(
        f"widths must be multiples of {SWIZZLES[-1] // itemsize} elements of {itemsize} bytes, got {width}"
    )
