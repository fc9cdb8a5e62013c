"""How a layer's arrays lie on its mesh: parameters, and the results of a call on a mesh with Explicit axes."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moe_jax.experts import EXPERT_PARAMETERS, SharedExperts
from moe_jax.parallel import LayerAxes
from moe_jax.parallel.sharding import expert_weight_specs, placed, shared_expert_spec
from moe_jax.runner.aux import MoEAux


def partition_spec(layer: Any, path: tuple[Any, ...]) -> PartitionSpec:
    """How the parameter of a `MoERunner` at `path` of its state is split."""
    if layer.axes is None:
        return PartitionSpec()
    part, *rest = path
    if part == "routed_experts" and rest[0] in EXPERT_PARAMETERS:
        return getattr(expert_weight_specs(layer.axes), rest[0])
    if part == "shared_experts" and isinstance(layer.shared_experts, SharedExperts):
        return shared_expert_spec(layer.axes, tuple(rest), is_fused=layer.config.fuse_shared_experts)
    return PartitionSpec()


def place_parts(layer: Any, mesh: Mesh, names: Sequence[str]) -> None:
    """Split the parameters of the layer's parts `names`, in place; those that are None have nothing to split."""
    for name in names:

        def place(path: tuple[Any, ...], value: Array, name: str = name) -> Array:
            return placed(value, NamedSharding(mesh, partition_spec(layer, (name, *path))))

        part = getattr(layer, name)
        if part is not None:
            nnx.update(part, nnx.map_state(place, nnx.state(part)))


def result_shardings(axes: LayerAxes, leading: tuple[Any, ...], *, is_partial: bool, with_aux: bool) -> Any:
    """Shardings of what a call returns, the leading dimensions split like those of the hidden states.

    Args:
        axes: the layer's.
        leading: how the leading dimensions of the hidden states are split.
        is_partial: the output has a dimension of ranks before them.
        with_aux: a `MoEAux` comes after the output.
    """
    rows: Any = PartitionSpec(*leading, None)
    whole: Any = PartitionSpec()
    output = PartitionSpec(axes.partial, *leading, None) if is_partial else rows
    if not with_aux:
        return NamedSharding(axes.mesh, output)
    aux = MoEAux(rows, rows, rows, whole, whole, whole, whole)  # specs stand where arrays will
    return jax.tree.map(lambda spec: NamedSharding(axes.mesh, spec), (output, aux))
