"""The definition of the grouped matmul, for tests and for reading: every group times every row, masked. Slow."""

import jax
import jax.numpy as jnp
from jax import Array

from ..groups import Groups, keep_rows
from ..rounding import rounded_to
from ..selection import Formulation
from ..varying import varying_like
from .request import Request

NAME = "reference"


def unsupported(request: Request) -> str | None:
    """Nothing is."""
    return None


def formulation(request: Request) -> Formulation:
    """There is one only."""
    return Formulation("all rows times the matrix of every group, masked", "it is the definition")


def run(request: Request) -> Array:
    """rows[i] @ weights[g].T + bias[g] for each row i of group g, in float32; zero for every other row."""
    weights = rounded_to(request.weights, request.rows.dtype)
    accumulator = jnp.promote_types(weights.dtype, jnp.float32)
    groups = Groups.of(request.group_sizes, request.group_offset, weights.shape[0])
    bias = jnp.zeros(weights.shape[:2], accumulator) if request.bias is None else request.bias.astype(accumulator)
    row = jnp.arange(request.rows.shape[0])

    def add_group(total: Array, group: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        start, size, matrix, offset = group
        member = (row >= start) & (row < start + size)
        product = jnp.dot(keep_rows(request.rows, member), matrix.T, preferred_element_type=accumulator) + offset
        return total + keep_rows(product, member), None

    nothing = varying_like(jnp.zeros((row.shape[0], weights.shape[1]), accumulator), request.rows)
    total, _ = jax.lax.scan(add_group, nothing, (groups.starts, groups.sizes, weights, bias))
    return total.astype(request.output_dtype)
