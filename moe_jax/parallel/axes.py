"""A layer's `ParallelConfig` resolved on a mesh: which axes, how many ranks, and what they must divide."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from moe_jax.config import AxisNames, MoEConfig, ParallelConfig


def axis_tuple(axes: AxisNames) -> tuple[str, ...]:
    """The mesh axes that `axes` flattens, in order; none for None."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The same devices and axis names, with every axis Auto: the compiler chooses the shardings between operations."""
    if set(mesh.axis_types) == {AxisType.Auto}:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


@dataclasses.dataclass(frozen=True)
class LayerAxes:
    """Mesh axes of one Mixture-of-Experts layer, by what they split.

    Experts are split over the *reduce* axes: whole experts over the expert axes, and each of them along its intermediate
    size over the tensor axes. Tokens are split over the *token* axes: data, then sequence axes. What a mesh axis does
    follows from where it is:

    - only a reduce axis: its ranks hold the same tokens and compute different parts of their results (`partial`);
    - both: its ranks hold different tokens and different experts, so that rows have to travel (`exchanged`);
    - only a token axis: its ranks have nothing to do with each other.
    """

    mesh: Mesh
    expert: tuple[str, ...]
    tensor: tuple[str, ...]
    data: tuple[str, ...]
    sequence: tuple[str, ...] = ()

    @classmethod
    def resolve(cls, parallel: ParallelConfig, mesh: Mesh) -> Self:
        """Look the axes up in `mesh`.

        Raises:
            ValueError: an axis is not in the mesh, or splits experts twice or tokens twice.
        """
        axes = cls(
            mesh=mesh,
            expert=axis_tuple(parallel.expert_axis),
            tensor=axis_tuple(parallel.tensor_axis),
            data=axis_tuple(parallel.data_axis),
            sequence=axis_tuple(parallel.sequence_axis),
        )
        for fields, names in (
            ("expert_axis and tensor_axis", axes.reduce),
            ("data_axis and sequence_axis", axes.tokens),
        ):
            if unknown := [name for name in names if name not in mesh.axis_names]:
                raise ValueError(
                    f"parallel axes must be axes of the mesh {mesh.axis_names}, got {', '.join(map(repr, unknown))}"
                )
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{fields} must not share a mesh axis, got {', '.join(map(repr, repeated))} twice")
        return axes

    def size(self, names: tuple[str, ...]) -> int:
        """Positions along the flattened `names`."""
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Axes over which tokens are split, the slowest first."""
        return self.data + self.sequence

    @property
    def reduce(self) -> tuple[str, ...]:
        """Axes over which the experts are split."""
        return self.expert + self.tensor

    @property
    def partial(self) -> tuple[str, ...]:
        """Axes whose ranks hold the same tokens, and each a part of their results that has to be summed."""
        return tuple(name for name in self.reduce if name not in self.tokens)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Axes whose ranks hold different tokens and different parts of the experts."""
        return tuple(name for name in self.reduce if name in self.tokens)

    @property
    def sliced(self) -> tuple[str, ...]:
        """Expert axes that hold the same tokens: before rows travel from rank to rank, each takes a slice of them."""
        return tuple(name for name in self.expert if name not in self.tokens)

    @property
    def num_ranks(self) -> int:
        """Ranks that each hold a partial result of the same tokens."""
        return self.size(self.partial)

    @property
    def platform(self) -> str:
        """Platform of the mesh's devices: "cpu", "gpu" or "tpu"."""
        platform = str(self.mesh.devices.flat[0].platform)
        return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)

    @property
    def num_hosts(self) -> int:
        """Hosts to which the mesh's devices belong: devices that fast links join, whatever the processes that run them."""
        return len({getattr(device, "slice_index", device.process_index) for device in self.mesh.devices.flat})

    def validate(self, config: MoEConfig) -> None:
        """Raise ValueError unless the layer divides evenly over the ranks: each holds one shard of an array of the experts."""
        experts, tensor = self.size(self.expert), self.size(self.tensor)
        if config.num_physical_experts % experts:
            raise ValueError(
                f"the {experts} ranks of expert_axis={self.expert} must divide the physical experts "
                f"(num_experts + num_redundant_experts), got {config.num_experts} + {config.num_redundant_experts}; "
                f"num_redundant_experts={-config.num_experts % experts} (of MoEConfig or from_pretrained) would"
            )
        if config.intermediate_size % tensor:
            raise ValueError(
                f"the {tensor} ranks of tensor_axis={self.tensor} must divide intermediate_size, "
                f"got {config.intermediate_size}"
            )
        shared = None if config.fuse_shared_experts else config.shared_experts
        if shared is not None and shared.intermediate_size % self.num_ranks:
            raise ValueError(
                f"the {self.num_ranks} ranks of {self.partial}, which hold the same tokens, must divide the "
                f"intermediate_size of the shared experts, got {shared.intermediate_size}"
            )

    def position(self, names: tuple[str, ...]) -> jax.Array | int:
        """Inside `jax.shard_map`: this device's position along the flattened `names`."""
        return jax.lax.axis_index(names) if names else 0

    def is_first(self, names: tuple[str, ...]) -> jax.Array | bool:
        """Inside `jax.shard_map`: whether this device is the first along the flattened `names`."""
        return self.position(names) == 0

    def spec(self, *dimensions: tuple[str, ...]) -> PartitionSpec:
        """A partition spec from one tuple of axes per dimension; an empty tuple is not split."""
        return PartitionSpec(*(names or None for names in dimensions))

    @property
    def has_explicit_axes(self) -> bool:
        """Whether the mesh puts shardings into the types of arrays."""
        return AxisType.Explicit in self.mesh.axis_types

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`jax.shard_map` of `function` over this mesh, or over the same mesh with the axis types of the context."""
        mesh = None if self._is_in_context() else self.mesh
        # Loops inside an expert implementation start from constants, which the check of varying axes would refuse.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _is_in_context(self) -> bool:
        """Whether a mesh is set around the call; ValueError if it is not the layer's."""
        context = jax.sharding.get_abstract_mesh()
        if not context.empty and dict(context.shape) != dict(self.mesh.shape):
            raise ValueError(
                f"the layer's mesh has axes {dict(self.mesh.shape)}, the one that is set {dict(context.shape)}"
            )
        return not context.empty
