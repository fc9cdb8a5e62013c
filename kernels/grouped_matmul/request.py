"""The validated arguments of a grouped matmul."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from ..argument_checks import (
    check_dtype_beside,
    check_floating,
    check_integer_scalar,
    check_integers,
    check_known_sizes,
)
from ..device import gpu_device_of, tpu_device_of
from ..selection import platform_of
from ..varying import equally_varying


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Arguments of `grouped_matmul`, checked once; arrays, tracers or (to explain a choice) `jax.ShapeDtypeStruct`s."""

    rows: Any
    weights: Any
    group_sizes: Any
    bias: Any
    group_offset: int | Array
    output_dtype: jnp.dtype
    platform: str
    gpu: Any
    """The `GpuDevice` that computes, or None."""
    tpu: Any
    """The `TpuDevice` that computes, or None."""

    @classmethod
    def of(
        cls,
        rows: Any,
        weights: Any,
        group_sizes: Any,
        bias: Any,
        group_offset: int | Array,
        preferred_element_type: DTypeLike | None,
    ) -> Self:
        """Check the arguments and describe them.

        Raises:
            ValueError: sizes that are symbolic, shapes that do not fit each other.
            TypeError: dtypes that are not floating (arrays) or integer (sizes, offset), or that differ; an offset that is not one
                integer.
        """
        check_known_sizes(rows=rows, weights=weights, group_sizes=group_sizes)
        check_integer_scalar("group_offset", group_offset)
        if rows.ndim != 2:
            raise ValueError(f"rows must be [M, D], got shape {rows.shape}")
        if weights.ndim != 3:
            raise ValueError(f"weights must be [G, N, D], got shape {weights.shape}")
        num_groups, width_out, width_in = weights.shape
        if num_groups < 1 or width_in < 1:
            raise ValueError(f"weights must be [G, N, D] with G >= 1 and D >= 1, got shape {weights.shape}")
        if rows.shape[1] != width_in:
            raise ValueError(f"rows [M, D] and weights [G, N, D] must share D, got {rows.shape} and {weights.shape}")
        if group_sizes.ndim != 1 or group_sizes.shape[0] < num_groups:
            raise ValueError(
                f"group_sizes must be one-dimensional with at least the {num_groups} groups of weights,"
                f" got shape {group_sizes.shape}"
            )
        if bias is not None and bias.shape != (num_groups, width_out):
            raise ValueError(f"bias must be [G, N] = {(num_groups, width_out)}, got shape {bias.shape}")
        last_offset = group_sizes.shape[0] - num_groups
        if isinstance(group_offset, int | np.integer) and not 0 <= group_offset <= last_offset:
            raise ValueError(
                f"group_offset must be in [0, {last_offset}] ({group_sizes.shape[0]} group sizes, {num_groups} groups of"
                f" weights), got {group_offset}"
            )
        check_floating(rows=rows, weights=weights, bias=bias)
        check_dtype_beside("rows", rows, weights=weights)
        check_integers(group_sizes=group_sizes)
        output_dtype = (
            jax.dtypes.canonicalize_dtype(rows.dtype)  # numpy's float64 becomes float32, unless JAX has 64 bits
            if preferred_element_type is None
            else jnp.dtype(preferred_element_type)
        )
        if not jnp.issubdtype(output_dtype, jnp.floating):
            raise TypeError(f"preferred_element_type must be floating, got {output_dtype}")
        return cls(
            rows,
            weights,
            group_sizes,
            bias,
            group_offset,
            output_dtype,
            platform_of(weights, rows),
            gpu_device_of(weights, rows),
            tpu_device_of(weights, rows),
        )

    def equally_varying(self) -> Self:
        """The same arguments, fit to meet each other in loops and custom gradients inside `jax.shard_map`."""
        names = ("rows", "weights", "group_sizes", "bias")
        arrays = equally_varying(*(getattr(self, name) for name in names), self.group_offset)
        return dataclasses.replace(self, **dict(zip(names, arrays, strict=False)))
