"""Kernels count in 32 bits, also where JAX's integers have 64 (`jax_enable_x64`)."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_32_bits(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, in which Python's integers and those that JAX makes have 32 bits; for what takes and gives no others."""

    @functools.wraps(function)
    def counting_in_32_bits(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return counting_in_32_bits
