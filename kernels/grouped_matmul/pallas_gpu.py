"""Grouped matmul by Mosaic GPU kernels, on Hopper and Blackwell: what they support; `pallas_gpu_multiply.py` computes."""

import jax.numpy as jnp
from jax import Array

from ..groups import Groups
from ..mosaic_gpu.limits import unsupported_device, unsupported_operands
from ..selection import Formulation
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
    from ..mosaic_gpu.matmuls import chosen_for_forward

    num_groups, width_out, width_in = request.weights.shape
    shape = (num_groups, 1, width_out, width_in)
    num_rows = request.rows.shape[0]
    kernel, chosen = chosen_for_forward(num_rows, shape, request.rows.dtype, request.output_dtype, request.gpu)
    return Formulation(f"{kernel} kernel, {chosen.tiles}", chosen.reason)


def run(request: Request) -> Array:
    """Multiply; differentiable in rows, weights and bias."""
    from .pallas_gpu_multiply import multiply_groups  # Mosaic GPU takes half a second to import

    rows, weights = request.rows, request.weights
    if rows.shape[0] == 0 or rows.shape[1] == 0 or weights.shape[1] == 0:
        return jnp.zeros((rows.shape[0], weights.shape[1]), request.output_dtype)
    groups = Groups.of(request.group_sizes, request.group_offset, weights.shape[0])
    return multiply_groups(request.gpu, request.output_dtype, rows, weights, request.bias, groups)
