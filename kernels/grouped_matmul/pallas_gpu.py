"""Grouped matmul by Mosaic GPU kernels, on Hopper and Blackwell: what they support; `sorted_rows_multiply.py` computes."""

import jax.numpy as jnp
from jax import Array

from ..mosaic_gpu.limits import unsupported_device, unsupported_operands
from ..selection import Formulation
from . import sorted_rows_multiply
from .request import Request

NAME = "pallas_gpu"


def unsupported(request: Request) -> str | None:
    """Devices other than Hopper and Blackwell, dtypes other than bfloat16 and float16, rows that no bulk copy can address."""
    output = jnp.dtype(request.output_dtype)
    if output not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the result must be float32, bfloat16 or float16, got {output}"
    _, width_out, width_in = request.weights.shape
    return unsupported_device(request.gpu, request.platform) or unsupported_operands(
        request.rows.dtype, D=width_in, N=width_out
    )


def formulation(request: Request) -> Formulation:
    """Kernel and tiles of the forward pass."""
    from ..mosaic_gpu import matmuls  # Mosaic GPU takes half a second to import

    return sorted_rows_multiply.formulation(request, matmuls, request.gpu)


def run(request: Request) -> Array:
    """Multiply; differentiable in rows, weights and bias."""
    from ..mosaic_gpu import matmuls

    return sorted_rows_multiply.run(request, matmuls, request.gpu)
