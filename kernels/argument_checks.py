"""Checks that the requests of several ops share; each raises an error that says what was wrong, the value and what is legal."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def check_known_sizes(**arrays: Any) -> None:
    """Raise ValueError if an array's shape has a symbolic size (`jax.export.symbolic_shape`): sizes decide what runs."""
    for name, array in arrays.items():
        if not all(isinstance(size, int | np.integer) for size in array.shape):
            sizes = ", ".join(map(str, array.shape))
            raise ValueError(
                f"{name} must have sizes that are known when it is traced, got [{sizes}]: "
                "export a program for each number of tokens"
            )


def check_integer_scalar(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is one integer, of Python, of NumPy or in an array: a fraction would be cut off."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be one integer, got {value!r}")
    elif not jnp.issubdtype(dtype, jnp.integer) or value.shape != ():
        raise TypeError(f"{name} must be one integer, got {dtype} of shape {value.shape}")


def check_floating(**arrays: Any) -> None:
    """Raise TypeError if an array is not floating; None is no array."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}")


def check_integers(**arrays: Any) -> None:
    """Raise TypeError if an array is not of integers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integer, got {array.dtype}")


def check_dtype_beside(rows_name: str, rows: Any, **weights: Any) -> None:
    """Raise TypeError unless weights have the dtype of the rows that they multiply, or float32."""
    for name, array in weights.items():
        if array.dtype not in (rows.dtype, jnp.float32):
            or_float32 = "" if rows.dtype == jnp.float32 else ", or float32 (to get float32 gradients)"
            raise TypeError(f"{name} must have the dtype of {rows_name}, {rows.dtype}{or_float32}, got {array.dtype}")
