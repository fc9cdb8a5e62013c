"""Rounding that a gradient does not see."""

import jax
from jax import Array
from jax.typing import DTypeLike


def rounded_to(array: Array, dtype: DTypeLike) -> Array:
    """`array` with its values rounded to `dtype`, in its own dtype; its gradient is passed on as it is, never rounded."""
    if array.dtype == dtype:
        return array
    rounding = array.astype(dtype).astype(array.dtype) - array  # exact: both lie within a factor of two, or it is zero
    return array + jax.lax.stop_gradient(rounding)
