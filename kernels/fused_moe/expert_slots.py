"""All experts at once, each on as many rows, from ordinary XLA operations: batched matmuls that read weights in place."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..activations import Activation
from .expert_block import ExpertMatrices, are_many, kept_apart, multiply, rows_come_first, unweighted_dtype


def slots_for(rows: int, itemsize: int) -> int:
    """The least number of slots for so many rows that XLA on CPUs multiplies well.

    32 or 64 slots of float32 take no longer than 24, 48 or 56 do.
    """
    return next((slots for slots in _few_slots(itemsize) if slots >= rows), -(-rows // 16) * 16)


def slots_within(rows: int, itemsize: int) -> int:
    """The largest such number of at most so many rows; 0 if there is none."""
    few = _few_slots(itemsize)
    return rows // 16 * 16 if rows > few[-1] else max((slots for slots in few if slots <= rows), default=0)


def _few_slots(itemsize: int) -> tuple[int, ...]:
    return (8, 16, 32, 64) if itemsize >= 4 else (8, 16, 32, 48, 64)


def apply_experts(
    rows: Float[Array, "E C H"], weights: ExpertMatrices, activation: Activation
) -> Float[Array, "E C H"]:
    """The outputs of E experts for C rows each, in `unweighted_dtype`; matmuls and activation in float32.

    Rows or weights are the left operand as for one expert (`expert_block.py`); after weights, what flows between the products is
    transposed, [E, I, C]. With many rows of bfloat16, products without a bias are rounded to bfloat16, as they are on the way to a
    gradient: float32 products take longer to write and to read than to compute.

    Args:
        rows: of each expert.
        weights: of the E experts, and no others.
        activation: between the two projections.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    num_experts, projections, width, hidden = weights.gate_up_proj.shape
    rows_first = rows_come_first(rows.shape[1], rows.dtype)
    narrow = unweighted_dtype(rows.dtype) if are_many(rows.shape[1]) else wide
    features = 2 if rows_first else 1

    def project(values: Array, contracted: int, matrices: Array, bias: Array | None) -> Array:
        dtype = narrow if bias is None else wide
        product = multiply(values, contracted, matrices, rows_first=rows_first, dtype=dtype)
        product = product.astype(wide) if rows_first else kept_apart(product)
        return product if bias is None else product + jnp.expand_dims(bias, 3 - features).astype(wide)

    gate_up_proj = weights.gate_up_proj.reshape(num_experts, projections * width, hidden)
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias.reshape(num_experts, -1)
    projected = project(rows, 2, gate_up_proj, gate_up_bias)
    activated = activation(*jnp.split(projected, projections, axis=features)).astype(rows.dtype)
    result = project(activated, features, weights.down_proj, weights.down_bias).astype(unweighted_dtype(rows.dtype))
    return result if rows_first else result.transpose(0, 2, 1)
