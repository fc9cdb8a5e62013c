"""What happens to a product before it is stored, as far as several kernels share it."""

import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ..activations import Activation


def activate(
    activation: Activation | None, projected: list[Float[Array, "rows columns"]]
) -> Float[Array, "rows columns"]:
    """The activation of gate and up (or of gate alone), all float32; without one, the only projection itself."""
    if activation is None:
        (result,) = projected
        return result
    if activation.name in ("gelu", "gelu_no_mul"):
        gate = 0.5 * projected[0] * (1 + lax.erf(projected[0] * math.sqrt(0.5)))  # Pallas TPU lowers erf, but not erfc
        return gate * projected[1] if activation.is_gated else gate
    return activation(*projected)


def column_of(line: Float[Array, "1 128"]) -> Float[Array, "128 1"]:
    """Values that lie along lanes, as a column: each of them is to scale a row.

    A column in device memory would take 128 times its bytes; here it is turned where it is used.
    """
    return jnp.broadcast_to(line, (128, 128)).T[:, :1]
