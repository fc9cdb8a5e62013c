"""Rounding that a gradient does not see."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded_to(array: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """`array` with its values rounded to those of `dtype`, in its own dtype; its gradient is passed on as it is, never rounded.

    A cast there and back would not do: XLA may drop such a pair as excess precision.
    """
    target, own = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if target.nmant >= own.nmant and target.nexp >= own.nexp:
        return array
    rounded = jax.lax.reduce_precision(array, exponent_bits=target.nexp, mantissa_bits=target.nmant)
    if target.minexp <= own.minexp:
        return rounded
    # Below its normal numbers `reduce_precision` knows zero only, but float16 has evenly spaced values down to zero there.
    spacing = float(target.smallest_subnormal)
    is_small = jnp.abs(array) < float(target.smallest_normal)
    return jnp.where(is_small, jnp.round(array / spacing) * spacing, rounded)


@rounded_to.defjvp
def _pass_on(dtype: DTypeLike, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return rounded_to(*primals, dtype), *tangents
