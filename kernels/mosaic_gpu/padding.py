"""Sizes that bulk copies can address."""

import jax.numpy as jnp
from jax import Array


def pad_to_multiples(array: Array, *multiples: int) -> Array:
    """`array` with zeros at the end of each axis, up to the next multiple; the array itself where it is one."""
    padding = [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, padding) if any(after for _, after in padding) else array
