"""Meshes by the names of their axes: "data", "expert" and "tensor" say what they split."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moe_jax.config import ParallelConfig

AXIS_ROLES = ("data", "expert", "tensor")
"""Axis names that say themselves what they split, in the order in which ranks talk ever more."""


def create_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh with Auto axes of these names and sizes, in their order; the last axis joins the closest devices.

    Args:
        sizes: axis name -> positions along it. One process may leave devices out, several must use all of theirs.

    Raises:
        ValueError: a size isn't positive, there are fewer devices than positions, or several processes would leave some out.
    """
    if bad := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"the sizes of mesh axes must be positive, got {written_axes(bad)}")
    needed, present = math.prod(sizes.values()), jax.device_count()
    if needed > present or (needed < present and jax.process_count() > 1):
        remark = ""
        if jax.process_count() > 1:
            remark = f" on {jax.process_count()} processes, which must all be used"
        elif jax.default_backend() == "cpu":
            remark = (
                f"; XLA_FLAGS=--xla_force_host_platform_device_count={needed}, set before JAX starts, simulates them"
            )
        raise ValueError(f"the mesh {written_axes(sizes)} needs {needed} devices, got {present}{remark}")
    return arrange_mesh(sizes, jax.devices()[:needed])


def arrange_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh of just these devices with Auto axes, each on neighbours as far as the devices' own links allow it.

    Args:
        sizes: axis name -> positions along it, which multiply to the number of devices.
        devices: of this machine, or of a topology.

    Raises:
        ValueError: more positions than devices.
    """
    shape, names, types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    except NotImplementedError:  # on TPUs, an axis that is a part of a physical one: 128 x 2 positions on 16 x 16 chips
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(arranged, names, axis_types=types)


def parallel_of(mesh: Mesh) -> ParallelConfig:
    """What the axis names of `mesh` ask for; a mesh with none of the names in `AXIS_ROLES` splits experts over all axes.

    Raises:
        ValueError: only some of the names are known.
    """
    known = [name for name in mesh.axis_names if name in AXIS_ROLES]
    if not known:
        return ParallelConfig(expert_axis=tuple(mesh.axis_names))
    if unknown := [name for name in mesh.axis_names if name not in AXIS_ROLES]:
        raise ValueError(
            f"mesh axes must be named {', '.join(AXIS_ROLES)}, or parallel= must say what they split; "
            f"got {', '.join(map(repr, unknown))} beside {', '.join(map(repr, known))}"
        )
    fields: dict[str, Any] = {f"{name}_axis": name for name in known}
    return ParallelConfig(**fields)


def parse_axes(text: str) -> dict[str, int]:
    """Sizes of axes from text such as "data=2,expert=32", in its order.

    Raises:
        ValueError: the text has another form, or names another axis or one twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXIS_ROLES or name in sizes or not size.isdecimal() or int(size) < 1:
            legal = ",".join(f"{role}=N" for role in AXIS_ROLES)
            raise ValueError(f"must be written as {legal}, each axis at most once and N at least 1; got {text!r}")
        sizes[name] = int(size)
    return sizes


def written_axes(sizes: Mapping[str, int]) -> str:
    """As `parse_axes` reads it."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())
