"""Where slices start, as `jax.lax.dynamic_slice` wants it."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def slice_starts(*values: int | Int[Array, ""]) -> tuple[Int[Array, ""], ...]:
    """The values as int32: all of one dtype, also where JAX's integers have 64 bits (`jax_enable_x64`)."""
    return tuple(jnp.asarray(value, jnp.int32) for value in values)
