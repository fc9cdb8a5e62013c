"""Rounds: a sum of as many terms as turn out to be there, and how many rows are worth one.

The sum has a gradient of its own: reverse-mode differentiation has none for such loops.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .varying import varying_like

_USUAL_FACTOR = 1.25
"""Room for what evenly spread choices bring, and for chance."""
_ROWS_WORTH_A_ROUND = 512
"""Rows for which there is room in any case: of each expert, where every round reads the weights of all of them. That takes as long
as multiplying 150 to 560 rows in bfloat16, by published peaks (A100, v6e): with fewer, another round costs as much."""


def rows_worth_a_round(expected_rows: float, num_experts: int) -> float:
    """Rows for which a round had better have room, if so many are expected, and it reads the weights of so many experts anew."""
    return max(_USUAL_FACTOR * expected_rows, _ROWS_WORTH_A_ROUND * num_experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_of_rounds(
    term: Callable[[Int[Array, ""], Any, Any], Array],
    num_rounds: Int[Array, ""],
    constants: PyTree[Array],
    variables: PyTree[Array],
    first: Array,
) -> Array:
    """`first`, plus the sum of `term(number, ...)` for number 1 to `num_rounds` - 1.

    A loop: each term's intermediate results are gone before the next one. Its gradient runs each term once more, and is summed in
    float32.

    Args:
        term: `(number, constants, variables)` to an array, always of one shape; a static argument, so hashable.
        num_rounds: how many terms there are, `first` included.
        constants: arrays for which there is no gradient.
        variables: arrays for which there is.
        first: term 0, computed by the caller.
    """
    return jax.lax.fori_loop(1, num_rounds, lambda number, total: total + term(number, constants, variables), first)


def _forward(term, num_rounds, constants, variables, first):
    return sum_of_rounds(term, num_rounds, constants, variables, first), (num_rounds, constants, variables)


def _backward(term, saved, cotangent):
    num_rounds, constants, variables = saved

    def add_gradient(number, totals):
        _, pull_back = jax.vjp(lambda variables: term(number, constants, variables), variables)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), totals, *pull_back(cotangent))

    def nothing(array):
        return varying_like(jnp.zeros(array.shape, jnp.promote_types(array.dtype, jnp.float32)), array)

    totals = jax.lax.fori_loop(1, num_rounds, add_gradient, jax.tree.map(nothing, variables))
    return None, None, jax.tree.map(lambda total, array: total.astype(array.dtype), totals, variables), cotangent


sum_of_rounds.defvjp(_forward, _backward)
