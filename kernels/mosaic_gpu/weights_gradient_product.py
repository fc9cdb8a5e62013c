"""The gradient of a grouped matmul with respect to its weights, on whichever GPU: each architecture has a kernel of its own."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..device import GpuDevice
from ..groups import Groups
from . import blackwell_weights_gradient_kernel, weights_gradient_kernel
from .choice import is_blackwell
from .tiles import WeightsGradientTiles


def weights_gradient(
    cotangent: Float[Array, "M N"],
    rows: Float[Array, "M D"],
    groups: Groups,
    *,
    tiles: WeightsGradientTiles,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> Float[Array, "G N D"]:
    """`cotangent[r].T @ rows[r]` over the rows r of each group, accumulated in float32 and rounded once; zero for an empty group.

    Rows outside the groups are never used, whatever they hold, NaN included.

    Args:
        cotangent: gradient with respect to the product, bfloat16 or float16, N a multiple of 16 (of 8 on Blackwell).
        rows: the rows that were multiplied, of the same dtype, D a multiple of 16 (of 8 on Blackwell).
        groups: where the groups lie; they may start at any row, and have any size.
        tiles: tile sizes, legal by `check_weights_gradient_tiles`, on Blackwell by `check_blackwell_weights_gradient_tiles`.
        output_dtype: bfloat16, float16 or float32.
        device: what the kernel runs on.

    Raises:
        ValueError: shapes that do not fit each other or cannot be copied, or tiles that the kernel does not take.
        TypeError: dtypes other than these.
    """
    output_dtype = jnp.dtype(output_dtype)
    _check_operands(cotangent, rows, output_dtype)
    num_groups = groups.sizes.shape[0]
    if rows.shape[0] == 0 or num_groups == 0:
        return jnp.zeros((num_groups, cotangent.shape[1], rows.shape[1]), output_dtype)
    kernel = blackwell_weights_gradient_kernel if is_blackwell(device) else weights_gradient_kernel
    return kernel.call(cotangent, rows, groups, tiles=tiles, output_dtype=output_dtype, device=device)


def _check_operands(cotangent: Array, rows: Array, output_dtype: jnp.dtype) -> None:
    if cotangent.ndim != 2 or rows.ndim != 2 or cotangent.shape[0] != rows.shape[0]:
        raise ValueError(
            f"cotangent [M, N] and rows [M, D] must be matrices that share M, got {cotangent.shape} and {rows.shape}"
        )
    if cotangent.dtype != rows.dtype or rows.dtype not in (jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"cotangent and rows must both be bfloat16 or both float16, got {cotangent.dtype} and {rows.dtype}"
        )
    if output_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"output_dtype must be bfloat16, float16 or float32, got {output_dtype}")
