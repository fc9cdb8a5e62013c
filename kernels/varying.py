"""Helpers for code that runs inside `jax.shard_map`, with or without its check of varying axes (`check_vma`)."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def equally_varying(*arrays: ArrayLike | None) -> tuple[jax.Array | None, ...]:
    """The arrays as JAX has them, each marked as varying over every manual mesh axis over which any of them varies.

    Loop carries and custom gradients need operands that vary alike. The mark is the identity outside `shard_map`; its
    transpose sums a gradient over the axes over which the operand itself was replicated, which is what its gradient is.
    """
    own = [None if array is None else jnp.asarray(array) for array in arrays]
    axes = frozenset().union(*(_varying_axes(array) for array in own if array is not None))
    return tuple(None if array is None else _vary(array, axes) for array in own)


def varying_like(array: jax.Array, reference: jax.Array) -> jax.Array:
    """`array`, marked as varying wherever `reference` varies."""
    return _vary(array, _varying_axes(reference))


def shape_varying_like(shape: tuple[int, ...], dtype: jnp.dtype, reference: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies wherever `reference` varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(reference).mat)


def _varying_axes(array: jax.Array) -> frozenset[str]:
    aval = jax.typeof(array)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # jax 0.12 renamed the field


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
