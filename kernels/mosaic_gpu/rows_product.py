"""Rows times the matrix of their group, on whichever GPU: each architecture has a kernel of its own."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ..activations import Activation
from ..device import GpuDevice
from . import blackwell_rows_kernel, rows_kernel
from .choice import is_blackwell
from .rows_problem import RowsProblem
from .schedule import TileTable
from .tiles import RowTiles


def multiply_rows(
    rows: Float[Array, "M D"],
    weights: Float[Array, "GP N D"] | Float[Array, "G D N"],
    table: TileTable,
    *,
    tiles: RowTiles,
    projections: int = 1,
    contract: Literal["in", "out"] = "in",
    bias: Float[Array, "GP N"] | None = None,
    activation: Activation | None = None,
    row_scale: Float[Array, "M"] | None = None,
    keep_projected: bool = False,
    zero_groups: bool,
    exact_rows: bool,
    output_dtype: DTypeLike,
    device: GpuDevice,
) -> tuple[Float[Array, "M N"], Float[Array, "M P N"] | None]:
    """row_scale * activation(rows @ matrices + bias), the matrices being those of each row's group.

    Accumulates, adds, activates and scales in float32, then rounds once to `output_dtype`.

    Args:
        rows: bfloat16 or float16, D a multiple of 16 (of 8 on Blackwell). M is anything with `exact_rows` or on Blackwell,
            otherwise a multiple of 8.
        weights: of the same dtype, N a multiple of 16 (of 8 on Blackwell). With `contract="in"` the `projections` matrices of
            each group, (out, in): their last axis is contracted (forward). With "out" one matrix per group, whose middle axis
            is contracted (gradient of rows).
        table: tiles of `tiles.rows` rows.
        tiles: tile sizes, legal by `check_row_tiles`, on Blackwell by `check_blackwell_row_tiles`.
        projections: matrices per group whose results meet in the activation: 2 (0 = gate, 1 = up) or 1.
        contract: see `weights`.
        bias: float32, bfloat16 or float16, added to each projection.
        activation: of the projections; None if there is one projection, which is then the result.
        row_scale: float32 factor of each row of the result.
        keep_projected: also return what enters the activation, for the backward pass.
        zero_groups: whether the table may hold tiles of group -1, whose rows become zero without anything being read.
        exact_rows: store no row outside a tile's own (compact layout), for which rows of the result must be multiples of 128
            bytes on Hopper; otherwise whole multiples of 8 rows (aligned layout).
        output_dtype: bfloat16, float16 or float32.
        device: what the kernel runs on.

    Returns:
        [M, N], and what enters the activation, [M, projections, N], if it is to be kept. Rows of no tile are not written: they
        hold anything, NaN too.

    Raises:
        ValueError: tiles that don't fit, widths that bulk copies cannot address, or several projections whose outputs are
            contracted.
    """
    if contract == "out" and projections != 1:
        raise ValueError(f"contract='out' takes one matrix per group, got projections={projections}")
    problem = RowsProblem(
        tiles=tiles,
        projections=projections,
        contract=contract,
        activation=activation,
        keep_projected=keep_projected,
        zero_groups=zero_groups,
        exact_rows=exact_rows,
        width_in=rows.shape[1],
        width_out=weights.shape[1 if contract == "in" else 2],
        output_dtype=jnp.dtype(output_dtype),
        device=device,
    )
    operands = {**table._asdict(), "rows": rows, "weights": weights}
    if bias is not None:
        operands["bias"] = bias
    if row_scale is not None:
        # What is read without a bulk copy must exist for the last, partial tile too.
        operands["row_scale"] = jnp.pad(row_scale.astype(jnp.float32), (0, tiles.rows))
    kernel = blackwell_rows_kernel if is_blackwell(device) else rows_kernel
    results = kernel.call(problem, operands)
    return results["result"], results.get("projected")
