"""One expert on one block of rows, from ordinary XLA operations.

With few rows weights are the left operand of both products, and what flows between them is transposed, [I, rows]. XLA's matmuls
on CPUs repack their right operand at every call; the right operand here is the small one (a block of rows), and weights are
streamed as they lie. At 4 to 32 rows this is two to three times faster than rows times transposed weights; with hundreds it is
slower by a tenth to a third. Processors without matrix units multiply very few rows of bfloat16 faster the other way round.

A matrix is multiplied in slices of a few megabytes, in a loop. XLA on CPUs copies what a dynamic index selects; a small copy
is reused from cache, a large one is written to fresh memory whose page faults cost more than the product.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..activations import Activation
from ..integers import slice_starts
from ..varying import varying_like

_FEWEST_ROWS_FIRST = 65
_MOST_FIRST_WITHOUT_MATRIX_UNITS = 16
"""Of bfloat16: 16 tokens of a block took 15 ms instead of 21, where 32 rows already took longer. With matrix units not measured."""


class ExpertMatrices(NamedTuple):
    """Matrices and biases of E experts: all matrices that there are, S = E of them, or those of one of several layers."""

    gate_up_proj: Float[Array, "S P I H"]
    down_proj: Float[Array, "S H I"]
    gate_up_bias: Float[Array, "E P I"] | None
    down_bias: Float[Array, "E H"] | None
    first_matrix: Int[Array, ""] | None = None
    """Which matrix is the first expert's; None: the first."""

    @property
    def start(self) -> Int[Array, ""] | int:
        """Which matrix is the first expert's."""
        return 0 if self.first_matrix is None else self.first_matrix

    def without_others(self, num_experts: int) -> "ExpertMatrices":
        """The same with the matrices of the E experts alone: a copy if there are others."""
        if self.first_matrix is None:
            return self
        gate_up_proj, down_proj = (
            jax.lax.dynamic_slice_in_dim(matrices, self.first_matrix, num_experts)
            for matrices in (self.gate_up_proj, self.down_proj)
        )
        return ExpertMatrices(gate_up_proj, down_proj, self.gate_up_bias, self.down_bias)

    def matrices_as(self, dtype: DTypeLike) -> "ExpertMatrices":
        """The same with both projections in `dtype`."""
        return self._replace(gate_up_proj=self.gate_up_proj.astype(dtype), down_proj=self.down_proj.astype(dtype))


def apply_expert(
    rows: Float[Array, "rows H"],
    weights: ExpertMatrices,
    expert: Int[Array, ""],
    activation: Activation,
    slice_bytes: int,
) -> Float[Array, "rows H"]:
    """The output of one expert for a block of rows, in `unweighted_dtype`; matmuls and activation in float32.

    Args:
        rows: the block.
        weights: of all experts.
        expert: which one.
        activation: between the two projections.
        slice_bytes: largest slice of a matrix that is copied at once.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    _, projections, width, hidden = weights.gate_up_proj.shape
    num_rows = rows.shape[0]
    rows_first = rows_come_first(num_rows, rows.dtype)
    features = 1 if rows_first else 0

    def gate_up_slice(first: Array | int, size: int) -> Array:
        shape = (1, projections, size, hidden)
        matrix = jax.lax.dynamic_slice(weights.gate_up_proj, slice_starts(weights.start + expert, 0, first, 0), shape)
        product = multiply(rows, 1, matrix.reshape(projections * size, hidden), rows_first=rows_first, dtype=wide)
        if weights.gate_up_bias is not None:
            bias = jax.lax.dynamic_slice(weights.gate_up_bias, slice_starts(expert, 0, first), shape[:3])
            product += jnp.expand_dims(bias.reshape(-1), 1 - features).astype(wide)
        return activation(*jnp.split(product, projections, axis=features)).astype(rows.dtype)

    def down_slice(first: Array | int, size: int) -> Array:
        start = slice_starts(weights.start + expert, first, 0)
        matrix = jax.lax.dynamic_slice(weights.down_proj, start, (1, size, width))[0]
        product = multiply(activated, features, matrix, rows_first=rows_first, dtype=wide)
        if weights.down_bias is not None:
            bias = jax.lax.dynamic_slice(weights.down_bias, slice_starts(expert, first), (1, size))[0]
            product += jnp.expand_dims(bias, 1 - features).astype(wide)
        return product.astype(unweighted_dtype(rows.dtype))

    def in_slices(compute: Callable[[Array | int, int], Array], height: int, depth: int, dtype: DTypeLike) -> Array:
        matrix_rows = slice_bytes // (depth * rows.dtype.itemsize)
        return _in_slices(compute, rows, height, num_rows, features, most=max(matrix_rows, 1), dtype=dtype)

    activated = in_slices(gate_up_slice, width, projections * hidden, rows.dtype)
    result = in_slices(down_slice, hidden, width, unweighted_dtype(rows.dtype))
    return result if rows_first else kept_apart(result).T


def unweighted_dtype(dtype: DTypeLike) -> jnp.dtype:
    """In which results wait for their router weight: float32 for float16, beyond whose 65504 they may lie until then."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def are_many(num_rows: int) -> bool:
    """Whether so many rows are the left operand of their products whatever the dtype and the processor."""
    return num_rows >= _FEWEST_ROWS_FIRST


def rows_come_first(num_rows: int, dtype: DTypeLike) -> bool:
    """Whether so many rows are the left operand of their products."""
    very_few = num_rows <= _MOST_FIRST_WITHOUT_MATRIX_UNITS and jnp.dtype(dtype) == jnp.bfloat16
    return are_many(num_rows) or (very_few and not has_matrix_units())


@functools.cache
def has_matrix_units() -> bool:
    """Whether this machine's processors multiply bfloat16 tiles (Intel's AMX), as Linux tells."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def multiply(
    values: Float[Array, "*E C D"] | Float[Array, "*E D C"],
    contracted: int,
    matrices: Float[Array, "*E N D"],
    *,
    rows_first: bool,
    dtype: DTypeLike,
) -> Float[Array, "*E C N"] | Float[Array, "*E N C"]:
    """Rows times (out, in) matrices, accumulated in float32 at least.

    Args:
        values: C rows, or their transpose.
        contracted: which axis of `values` is D.
        matrices: one, or one for each of E experts.
        rows_first: whether the rows are the left operand, and the result is [C, N].
        dtype: of the result.
    """
    batch = tuple(range(values.ndim - 2))
    operands = ((values, contracted), (matrices, matrices.ndim - 1))
    (left, left_axis), (right, right_axis) = operands if rows_first else reversed(operands)
    dimensions = (((left_axis,), (right_axis,)), (batch, batch))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=dtype)


def kept_apart(product: Array) -> Array:
    """A product; keeps XLA from merging it with the transposition that follows, which would swap its operands."""
    return jax.lax.optimization_barrier(product)


def _in_slices(
    compute: Callable[[Array | int, int], Array],
    like: Array,
    height: int,
    num_rows: int,
    axis: int,
    *,
    most: int,
    dtype: DTypeLike,
) -> Array:
    """`height` features of `num_rows` rows by `compute(first, size)`, over slices of equal size of at most `most` features.

    The features are that axis of the result. The last slice may repeat some of the one before it. A loop even where the number is
    static: unrolled, XLA would hold the copies of all slices at once.
    """
    number = math.ceil(height / most)
    size = math.ceil(height / number)
    number = math.ceil(height / size)
    if number == 1:
        return compute(0, height)

    def one_slice(index: Array, result: Array) -> Array:
        first = jnp.minimum(index * size, height - size)
        start = (0, first) if axis == 1 else (first, 0)
        return jax.lax.dynamic_update_slice(result, compute(first, size), slice_starts(*start))

    shape = (num_rows, height) if axis == 1 else (height, num_rows)
    return jax.lax.fori_loop(0, number, one_slice, varying_like(jnp.zeros(shape, dtype), like))
