"""Random problems for the TPU kernel on rows of groups, interpreted with race detection, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from oracles import experts as oracle
from support.rounding import ROUNDED_ONCE
from support.tpu_interpretation import interpreting_tpu

from moe_jax.kernels.device import TPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_tpu import rows_kernel
from moe_jax.kernels.mosaic_tpu.schedule import VisitTable
from moe_jax.kernels.mosaic_tpu.tiles import RowTiles

TILES = RowTiles(rows=256, columns=128, chunk=128, remainder=64, least=64, most=192)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random operands, and the float64 result that the rows of each group must have."""

    operands: dict
    groups: Groups
    projected: np.ndarray
    """[P, M, N], zero in rows of no group."""
    result: np.ndarray
    """[M, N], zero in rows of no group."""


def draw(
    rng,
    sizes,
    *,
    start=3,
    num_rows=None,
    width_in=72,
    width_out=200,
    projections=1,
    contract="in",
    activation=None,
    bias=False,
    row_scale=False,
    dtype=jnp.float32,
):
    """A problem whose rows hold NaN wherever they belong to no group."""
    sizes = np.array(sizes)
    end = start + int(sizes.sum())
    num_rows = num_rows or -(-(end + 20) // 16) * 16
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.full((num_rows, width_in), np.nan)
    rows[start:end] = rng.normal(size=(end - start, width_in))
    rows = jnp.array(rows, dtype)
    weights = jnp.array(rng.normal(size=(len(sizes), projections, width_out, width_in)) / width_in**0.5, dtype)
    biases = jnp.array(rng.normal(size=(len(sizes), projections, width_out)), dtype)
    scale = np.full(num_rows, np.nan, np.float32)
    scale[start:end] = rng.uniform(0.5, 1.5, end - start)

    projected = np.zeros((projections, num_rows, width_out))
    for row, group in zip(range(start, end), group_of_row, strict=True):
        projected[:, row] = np.float64(weights[group]) @ np.float64(rows[row])
        if bias:
            projected[:, row] += np.float64(biases[group])
    result = projected[0]
    if activation is not None:
        parameters = {name: getattr(activation, name) for name in ("limit", "alpha", "beta")}
        result = oracle.activate(activation.name, *projected, **parameters)
    if row_scale:
        result = np.where(np.isnan(scale)[:, None], 0, result * scale[:, None])
    operands = dict(rows=rows, contract=contract, activation=activation)
    operands["weights"] = weights if contract == "in" else weights.swapaxes(2, 3)
    operands["bias"] = biases if bias else None
    operands["row_scale"] = jnp.array(scale) if row_scale else None
    groups = Groups(jnp.array(start + np.cumsum(sizes) - sizes, jnp.int32), jnp.array(sizes, jnp.int32))
    return Problem(operands, groups, projected, result)


def multiply(problem, *, dma="on_wait", tiles=TILES, device="v5e", zero_outside=True, **options):
    """The kernel's result and projections, without the padding of columns."""
    width_out = problem.result.shape[1]
    options = dict(output_dtype=jnp.float32) | options
    with interpreting_tpu(device, dma=dma) as interpretation:
        num_rows = problem.operands["rows"].shape[0]
        table = VisitTable.of(problem.groups, num_rows, tiles.rows, zero_outside=zero_outside)
        result, projected = rows_kernel.multiply_rows(
            **problem.operands, table=table, tiles=tiles, device=TPU_DEVICES[device], **options
        )
        jax.block_until_ready(result)
    assert interpretation.num_kernels == 1
    return result[:, :width_out], None if projected is None else projected[:, :, :width_out]


def assert_close(result, expected, dtype=jnp.float32):
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=0, atol=ROUNDED_ONCE[jnp.dtype(dtype).name] * scale
    )
