"""Grouped matmul from Mosaic GPU kernels, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from ..device import GpuDevice
from ..groups import Groups
from ..mosaic_gpu import matmuls


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply_groups(
    device: GpuDevice,
    output_dtype: jnp.dtype,
    rows: Array,
    weights: Array,
    bias: Array | None,
    groups: Groups,
) -> Array:
    """rows[i] @ weights[g].T + bias[g] for the rows of every group, zero for the others: [M, N] of `output_dtype`."""
    matrices = weights.astype(rows.dtype)
    return matmuls.multiply_compact(rows, matrices, groups, bias=bias, output_dtype=output_dtype, device=device)


def _forward(device, output_dtype, rows, weights, bias, groups):
    result = multiply_groups(device, output_dtype, rows, weights, bias, groups)
    return result, (rows, weights, bias, groups)


def _backward(device, output_dtype, saved, cotangent):
    rows, weights, bias, groups = saved
    narrow = cotangent.astype(rows.dtype)
    rows_gradient = matmuls.multiply_compact(
        narrow, weights.astype(rows.dtype), groups, contract="out", output_dtype=rows.dtype, device=device
    )
    weights_gradient = matmuls.weights_gradient(narrow, rows, groups, output_dtype=weights.dtype, device=device)
    bias_gradient = None if bias is None else matmuls.bias_gradient(cotangent, groups).astype(bias.dtype)
    return rows_gradient, weights_gradient, bias_gradient, None


multiply_groups.defvjp(_forward, _backward)
