"""Grouped matmul from Mosaic GPU kernels, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from ..device import GpuDevice
from ..groups import Groups, keep_rows
from ..mosaic_gpu import matmuls
from ..mosaic_gpu.schedule import aligned_groups, aligned_num_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def multiply_groups(
    device: GpuDevice,
    output_dtype: jnp.dtype,
    streamed: bool,
    rows: Array,
    weights: Array,
    bias: Array | None,
    groups: Groups,
) -> Array:
    """rows[i] @ weights[g].T + bias[g] for the rows of every group, zero for the others: [M, N] of `output_dtype`."""
    matrices = weights.astype(rows.dtype)
    if streamed:
        return _stream(device, output_dtype, rows, matrices, bias, groups)
    return matmuls.multiply_compact(rows, matrices, groups, bias=bias, output_dtype=output_dtype, device=device)


def _stream(device, output_dtype, rows, weights, bias, groups) -> Array:
    """By the kernel for few rows, which wants them aligned: they are moved there and back."""
    num_rows, num_groups = rows.shape[0], weights.shape[0]
    aligned = aligned_groups(groups.sizes)
    row = jnp.arange(num_rows)
    group = jnp.sum(row[:, None] >= (groups.starts + groups.sizes)[None, :], axis=1)
    group = jnp.minimum(group, num_groups - 1)
    contained = groups.contain(num_rows)
    length = aligned_num_rows(num_rows, num_groups)
    place = jnp.where(contained, aligned.starts[group] + row - groups.starts[group], length)
    source = jnp.zeros(length, jnp.int32).at[place].set(row, mode="drop", unique_indices=True)
    result = matmuls.multiply(
        rows[source],
        weights[:, None],
        aligned,
        bias=None if bias is None else bias[:, None],
        output_dtype=output_dtype,
        device=device,
    )
    return keep_rows(result[jnp.minimum(place, length - 1)], contained)


def _forward(device, output_dtype, streamed, rows, weights, bias, groups):
    result = multiply_groups(device, output_dtype, streamed, rows, weights, bias, groups)
    return result, (rows, weights, bias, groups)


def _backward(device, output_dtype, streamed, saved, cotangent):
    rows, weights, bias, groups = saved
    narrow = cotangent.astype(rows.dtype)
    rows_gradient = matmuls.multiply_compact(
        narrow, weights.astype(rows.dtype), groups, contract="out", output_dtype=rows.dtype, device=device
    )
    weights_gradient = matmuls.weights_gradient(narrow, rows, groups, output_dtype=weights.dtype, device=device)
    bias_gradient = None if bias is None else matmuls.bias_gradient(cotangent, groups).astype(bias.dtype)
    return rows_gradient, weights_gradient, bias_gradient, None


multiply_groups.defvjp(_forward, _backward)
