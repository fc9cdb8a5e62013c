"""A sum of as many terms as turn out to be there, with a gradient: reverse-mode differentiation has none for such loops."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_of_rounds(
    term: Callable[[Int[Array, ""], Any, Any], Array],
    behind: Int[Array, ""],
    constants: PyTree[Array],
    variables: PyTree[Array],
) -> Array:
    """`term(1, ...) + term(2, ...) + ...`, up to and without `behind`: the terms behind the first one, number 0.

    A loop: each term's intermediate results are gone before the next one. Its gradient runs each term once more.

    Args:
        term: `(number, constants, variables)` to an array, always of one shape; a static argument, so hashable.
        behind: number of the term that isn't there any more.
        constants: arrays for which there is no gradient.
        variables: arrays for which there is.
    """
    shape = jax.eval_shape(term, behind, constants, variables)
    zero = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(1, behind, lambda number, total: total + term(number, constants, variables), zero)


def _forward(term, behind, constants, variables):
    return sum_of_rounds(term, behind, constants, variables), (behind, constants, variables)


def _backward(term, saved, cotangent):
    behind, constants, variables = saved

    def add_gradient(number, totals):
        _, pull_back = jax.vjp(lambda variables: term(number, constants, variables), variables)
        return jax.tree.map(jnp.add, totals, *pull_back(cotangent))

    zero = jax.tree.map(jnp.zeros_like, variables)
    return None, None, jax.lax.fori_loop(1, behind, add_gradient, zero)


sum_of_rounds.defvjp(_forward, _backward)
