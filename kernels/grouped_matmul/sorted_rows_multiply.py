"""Grouped matmul from kernels on sorted rows, with its gradient: the same on GPUs and TPUs but for the kernels."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from ..device import GpuDevice, TpuDevice
from ..groups import Groups
from ..selection import Formulation
from .request import Request


def formulation(request: Request, matmuls: ModuleType, device: GpuDevice | TpuDevice) -> Formulation:
    """Kernel and tiles of the forward pass."""
    num_groups, width_out, width_in = request.weights.shape
    shape = (num_groups, 1, width_out, width_in)
    num_rows = request.rows.shape[0]
    kernel, chosen = matmuls.chosen_for_forward(num_rows, shape, request.rows.dtype, request.output_dtype, device)
    return Formulation(f"{kernel} kernel, {chosen.tiles}", chosen.reason)


def run(request: Request, matmuls: ModuleType, device: GpuDevice | TpuDevice) -> Array:
    """Multiply with these kernels; differentiable in rows, weights and bias."""
    rows, weights = request.rows, request.weights
    if rows.shape[0] == 0 or weights.shape[1] == 0:
        return jnp.zeros((rows.shape[0], weights.shape[1]), request.output_dtype)
    groups = Groups.of(request.group_sizes, request.group_offset, weights.shape[0])
    return multiply_groups(matmuls, device, request.output_dtype, rows, weights, request.bias, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def multiply_groups(
    matmuls: ModuleType,
    device: GpuDevice | TpuDevice,
    output_dtype: jnp.dtype,
    rows: Array,
    weights: Array,
    bias: Array | None,
    groups: Groups,
) -> Array:
    """rows[i] @ weights[g].T + bias[g] for the rows of every group, zero for the others: [M, N] of `output_dtype`.

    `matmuls`: the kernels, `mosaic_gpu.matmuls` or `mosaic_tpu.matmuls`, which have the same functions.
    """
    matrices = weights.astype(rows.dtype)
    return matmuls.multiply_compact(rows, matrices, groups, bias=bias, output_dtype=output_dtype, device=device)


def _forward(matmuls, device, output_dtype, rows, weights, bias, groups):
    result = multiply_groups(matmuls, device, output_dtype, rows, weights, bias, groups)
    return result, (rows, weights, bias, groups)


def _backward(matmuls, device, output_dtype, saved, cotangent):  # noqa: ARG001 - as `jax.custom_vjp` calls it
    rows, weights, bias, groups = saved
    narrow = cotangent.astype(rows.dtype)
    rows_gradient = matmuls.multiply_compact(
        narrow, weights.astype(rows.dtype), groups, contract="out", output_dtype=rows.dtype, device=device
    )
    weights_gradient = matmuls.weights_gradient(narrow, rows, groups, output_dtype=weights.dtype, device=device)
    bias_gradient = None if bias is None else matmuls.bias_gradient(cotangent, groups).astype(bias.dtype)
    return rows_gradient, weights_gradient, bias_gradient, None


multiply_groups.defvjp(_forward, _backward)
