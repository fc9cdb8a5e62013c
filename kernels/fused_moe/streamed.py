"""Few rows on CPUs: weights streamed through one elementwise pass, without a matmul and without a copy.

XLA on CPUs copies what a dynamic index selects before it multiplies it, and a single row gives a matmul nothing to reuse: the
copy costs several times the product. A slice that is only multiplied and added elementwise is read where it lies. So a
matrix is cut into columns of chunks: chunk by chunk, weights times the row's chunk are added up into `[N, chunk]`, whose rows
are then summed. That reads every weight once, in order, on all cores.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..activations import Activation
from ..integers import slice_starts
from .expert_block import ExpertMatrices

_CACHE_LINE_BYTES = 64
_MOST_CHUNKS = 64
"""Chunks are unrolled; more would make compiling slow."""
_MOST_CHUNKS_OF_LONG_ROWS = 16
"""Of float32 rows with more cache lines than `_MOST_CHUNKS`: each chunk is then a stream of lines, which is fetched ahead."""


def apply_expert_to_row(
    row: Float[Array, "H"], weights: ExpertMatrices, expert: Int[Array, ""], activation: Activation
) -> Float[Array, "H"]:
    """The output of one expert for one row, accumulated in float32 (float64 for float64 rows) and returned so."""
    _, projections, width, hidden = weights.gate_up_proj.shape
    stacked = weights.gate_up_proj.reshape(-1, projections * width, hidden)
    projected = multiply_row(row, stacked, weights.start + expert)
    if weights.gate_up_bias is not None:
        projected += weights.gate_up_bias[expert].reshape(-1).astype(projected.dtype)
    activated = activation(*jnp.split(projected, projections)).astype(row.dtype)
    result = multiply_row(activated, weights.down_proj, weights.start + expert)
    return result if weights.down_bias is None else result + weights.down_bias[expert].astype(result.dtype)


def multiply_row(row: Float[Array, "D"], weights: Float[Array, "G N D"], group: Int[Array, ""]) -> Float[Array, "N"]:
    """weights[group] @ row, in float32 (float64 for float64 rows)."""
    _, height, depth = weights.shape
    wide = jnp.promote_types(row.dtype, jnp.float32)
    chunk = min(depth, _chunk_of(depth, weights.dtype.itemsize))
    # Finished before the pass: XLA would convert, or activate, the row anew for every row of the matrix.
    row = jax.lax.optimization_barrier(row.astype(wide))
    total = jnp.zeros((height, chunk), wide)
    for first in range(0, depth, chunk):
        start = min(first, depth - chunk)  # the last chunk may overlap the one before it, whose numbers count once
        numbers = jax.lax.slice_in_dim(row, start, start + chunk)
        numbers = jnp.where(jnp.arange(start, start + chunk) >= first, numbers, 0)
        columns = jax.lax.dynamic_slice(weights, slice_starts(group, 0, start), (1, height, chunk))[0]
        total += columns.astype(wide) * numbers

    # As a product with ones, because XLA on CPUs adds the numbers of a row one after another. The barrier keeps the sum
    # out of the pass over the weights.
    return jax.lax.optimization_barrier(total) @ jnp.ones(chunk, wide)


def _chunk_of(depth: int, itemsize: int) -> int:
    """How many numbers of a row are added up side by side.

    A cache line, so that as many lines as possible are on their way at once. What is fastest with longer rows was measured: of
    width 2048 to 7168, float32 reads 20 to 40 % faster with few long chunks, bfloat16 no faster.
    """
    line = _CACHE_LINE_BYTES // itemsize
    most = _MOST_CHUNKS_OF_LONG_ROWS if depth > line * _MOST_CHUNKS and itemsize >= 4 else _MOST_CHUNKS
    chunk = line
    while depth > chunk * most:
        chunk *= 2
    return chunk
