"""All experts at once, each on as many rows, from ordinary XLA operations: batched matmuls that read weights in place."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..activations import Activation
from .expert_block import ExpertWeights, kept_apart

_ROWS_FIRST = 64
"""From so many rows on, float32 rows are the left operand: products are as fast, and nothing is transposed. bfloat16 products are
slower that way, by more than transposing takes."""


def apply_experts(rows: Float[Array, "E C H"], weights: ExpertWeights, activation: Activation) -> Float[Array, "E C H"]:
    """The outputs of E experts for C rows each, in their dtype; matmuls and activation in float32.

    With few rows, or rows of two bytes an element, weights are the left operand, as for one expert (`expert_block.py`), and what
    flows between the products is transposed, [E, I, C].

    Args:
        rows: of each expert.
        weights: of the E experts, and no others.
        activation: between the two projections.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    num_experts, projections, width, hidden = weights.gate_up_proj.shape
    rows_first = rows.shape[1] >= _ROWS_FIRST and rows.dtype.itemsize >= 4
    features = 2 if rows_first else 1

    def multiply(values: Array, contracted: int, matrices: Array, bias: Array | None) -> Array:
        operands = ((values, contracted), (matrices, 2))
        (left, left_axis), (right, right_axis) = operands if rows_first else reversed(operands)
        dimensions = (((left_axis,), (right_axis,)), ((0,), (0,)))
        product = kept_apart(jax.lax.dot_general(left, right, dimensions, preferred_element_type=wide))
        return product if bias is None else product + jnp.expand_dims(bias, 3 - features).astype(wide)

    gate_up_proj = weights.gate_up_proj.reshape(num_experts, projections * width, hidden)
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias.reshape(num_experts, -1)
    projected = multiply(rows, 2, gate_up_proj, gate_up_bias)
    activated = activation(*jnp.split(projected, projections, axis=features)).astype(rows.dtype)
    result = multiply(activated, features, weights.down_proj, weights.down_bias).astype(rows.dtype)
    return result if rows_first else result.transpose(0, 2, 1)
