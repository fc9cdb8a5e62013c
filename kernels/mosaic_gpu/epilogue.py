"""What happens to an accumulator before it is stored, as far as several kernels share it."""

import math

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from ..activations import Activation
from .ref import Ref


def load_vector(ref: Ref) -> Float[Array, "size"]:
    """A vector from global memory, in whatever layout its use asks for."""
    return plgpu.load(ref, optimized=False)  # optimized loads of vectors of a tile's rows exist only from jax 0.12 on


def activate(
    activation: Activation | None, projected: list[Float[Array, "rows columns"]]
) -> Float[Array, "rows columns"]:
    """The activation of gate and up (or of gate alone), all float32; without one, the only projection itself."""
    if activation is None:
        (result,) = projected
        return result
    if activation.name in ("gelu", "gelu_no_mul"):
        gate = 0.5 * projected[0] * (1 + _erf(projected[0] * math.sqrt(0.5)))
        return gate * projected[1] if activation.is_gated else gate
    return activation(*projected)


_ERF_SLOPE = 0.3275911
_ERF_COEFFICIENTS = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _erf(x: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """The error function to 1.5e-7, from operations that Mosaic GPU lowers (it lowers neither erf nor erfc).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    magnitude = jnp.abs(x)
    t = 1 / (1 + _ERF_SLOPE * magnitude)
    polynomial = jnp.zeros_like(x)
    for coefficient in reversed(_ERF_COEFFICIENTS):
        polynomial = (polynomial + coefficient) * t
    result = 1 - polynomial * jnp.exp(-magnitude * magnitude)
    return jnp.where(x < 0, -result, result)
