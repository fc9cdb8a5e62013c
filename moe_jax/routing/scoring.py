"""Scores: router logits → how much each expert is worth to a token, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_EXPONENTIAL_BELOW = -30.0
"""Below this, `softplus(x)` equals `exp(x)` to float32 precision."""


def softmax(logits: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Softmax over the last axis, its maximum subtracted first."""
    return jax.nn.softmax(logits, axis=-1)


def sigmoid(logits: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Elementwise logistic function: experts do not compete in the score."""
    return jax.nn.sigmoid(logits)


def sqrtsoftplus(logits: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Elementwise `sqrt(log(1 + exp(x)))` (DeepSeek-V4), with a finite gradient everywhere.

    Far below zero the formula is `exp(x / 2)`; taken literally it would underflow to `sqrt(0)`, whose gradient is NaN.
    """
    far_below = logits < _EXPONENTIAL_BELOW
    usual = jnp.sqrt(jax.nn.softplus(jnp.where(far_below, 0.0, logits)))
    return jnp.where(far_below, jnp.exp(0.5 * jnp.where(far_below, logits, 0.0)), usual)


SCORES: dict[str, Callable[[Float[Array, "T E"]], Float[Array, "T E"]]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sqrtsoftplus": sqrtsoftplus,
}
"""The functions behind `RouterConfig.scoring` (spec 2.4, 2.5)."""
