"""Weights of the chosen experts: gather, renormalise. An id below zero is no expert and weighs nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gather_per_expert(values: Float[Array, "T E"], ids: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """`values[t, ids[t, k]]`; 0 where the id is negative. Ids of E or more read the last expert."""
    found = jnp.take_along_axis(values, ids, axis=-1, mode="clip")
    return jnp.where(ids < 0, 0.0, found)


def spoil_tokens_with_unknown_ids(
    weights: Float[Array, "T K"], ids: Int[Array, "T K"], num_candidates: int
) -> Float[Array, "T K"]:
    """All weights of a token NaN if one of its ids is `num_candidates` or more.

    For ids that came from outside: under `jit` nothing can be raised, and a wrong id must not pass for an expert.
    """
    has_unknown = (ids >= num_candidates).any(axis=-1, keepdims=True)
    return jnp.where(has_unknown, jnp.nan, weights)


def renormalize(weights: Float[Array, "T K"], *, epsilon: float = 0.0) -> Float[Array, "T K"]:
    """Each row divided by its sum.

    With `epsilon=0` a sum that is not positive counts as 1 (vLLM); otherwise `epsilon` is added to it (Hugging Face).
    """
    total = weights.sum(axis=-1, keepdims=True)
    denominator = total + epsilon if epsilon else jnp.where(total > 0, total, 1.0)
    # The gradient of a quotient divides by the square of the denominator, which of a tiny one is zero in float32. A power of two
    # changes no bit of the result.
    lift = jnp.where(denominator < 2.0**-40, 2.0**90, 1.0)
    return (weights * lift) / (denominator * lift)
