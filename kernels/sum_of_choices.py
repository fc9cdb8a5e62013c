"""The results of a token's choices lie anywhere among the rows of experts; here they become one row per token again."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


def sum_of_choices(
    results: Float[Array, "R H"],
    position: Int[Array, "T K"],
    *,
    weights: Float[Array, "T K"] | None = None,
    counts: Bool[Array, "T K"] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "T H"]:
    """Weighted sum of each token's results, in the order of its choices.

    One gather per choice: on CPUs far faster than one gather of [T, K, H] and a sum over K, or a scatter, whose order of summation
    is undefined on GPUs.

    Args:
        results: rows in any order.
        position: row of each choice's result; any row for a choice that doesn't count.
        weights: factors of the results; None: 1.
        counts: which choices count; results and weights of the others may be anything, NaN too. None: all of them.
        dtype: of the sum, to which results are converted first; None: that of the weights, or of the results if there are none.
    """
    if dtype is None:
        dtype = results.dtype if weights is None else weights.dtype
    total = jnp.zeros((), dtype)
    for choice in range(position.shape[1]):
        term = results[position[:, choice]].astype(dtype)
        if weights is not None:
            term = weights[:, choice, None] * term
        if counts is not None:
            term = jnp.where(counts[:, choice, None], term, 0)
        total = total + term
    return total
