"""Layers over many devices: mesh axes, and one file per dispatch strategy."""

from moe_jax.parallel.axes import LayerAxes, axis_tuple, with_auto_axes

__all__ = ["LayerAxes", "axis_tuple", "with_auto_axes"]
