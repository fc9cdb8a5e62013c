"""Layers over many devices: mesh axes, and one file per dispatch strategy."""

from moe_jax.parallel.axes import LayerAxes, axis_tuple, with_auto_axes
from moe_jax.parallel.distributed import initialize_distributed
from moe_jax.parallel.meshes import AXIS_ROLES, arrange_mesh, create_mesh, parallel_of, parse_axes, written_axes

__all__ = [
    "AXIS_ROLES",
    "LayerAxes",
    "arrange_mesh",
    "axis_tuple",
    "create_mesh",
    "initialize_distributed",
    "parallel_of",
    "parse_axes",
    "with_auto_axes",
    "written_axes",
]
