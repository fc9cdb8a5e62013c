"""Integers of 32 bits, also where JAX's have 64 (`jax_enable_x64`)."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def slice_starts(*values: int | Int[Array, ""]) -> tuple[Int[Array, ""], ...]:
    """Where a slice starts, as `jax.lax.dynamic_slice` wants it: all of one dtype."""
    return tuple(jnp.asarray(value, jnp.int32) for value in values)


def in_32_bits(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, in which Python's integers and those that JAX makes have 32 bits; for kernels, which have no others.

    What it takes and gives must not have 64 bits, floating numbers included.
    """

    @functools.wraps(function)
    def counting_in_32_bits(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return counting_in_32_bits
