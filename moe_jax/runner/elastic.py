"""Going from n to m ranks: a layer's parameters are placed anew, from device to device, without reading a checkpoint again."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Array

from moe_jax.config import ParallelConfig
from moe_jax.experts import ExpertWeights
from moe_jax.runner.physical_experts import initial_placement, initial_replicas, resolve_axes
from moe_jax.runner.runner import MoERunner


def move_layer(
    layer: MoERunner,
    mesh: Mesh | None,
    parallel: ParallelConfig | None = None,
    *,
    num_redundant_experts: int | None = None,
) -> MoERunner:
    """The same layer on other devices; `layer` stays as it is, and shares arrays that needn't move.

    Weights keep their bits. A placement that load balancing has found is kept if there are as many slots as before; otherwise, and
    under `round_robin`, which depends on the number of ranks, slots are filled anew, as in a fresh layer.

    Args:
        layer: on any mesh, or none.
        mesh: where it goes; None: the first device of its mesh.
        parallel: how `mesh` splits it; None: as before (without a mesh: not at all).
        num_redundant_experts: how many redundant experts there are then; None: as many as before.

    Raises:
        ValueError: `mesh` cannot split the layer evenly, or lacks an axis.
    """
    if mesh is None:
        parallel = ParallelConfig() if parallel is None else parallel
    before = layer.config
    redundant = before.num_redundant_experts if num_redundant_experts is None else num_redundant_experts
    config = dataclasses.replace(before, parallel=parallel or before.parallel, num_redundant_experts=redundant)
    axes = resolve_axes(config, mesh)

    graph, state = nnx.split(layer)
    moved = nnx.merge(graph, state)
    moved.config, moved.axes = config, axes
    old_slots, new_slots = initial_placement(before, layer.axes), initial_placement(config, axes)
    if not np.array_equal(old_slots, new_slots):
        _fill_slots(moved.routed_experts, _slot_of_each_expert(layer)[new_slots])
        moved.replicas = nnx.data(initial_replicas(config, axes))
    moved.check_parts()

    here = SingleDeviceSharding(jax.devices()[0] if layer.axes is None else layer.axes.mesh.devices.flat[0])

    def place(spec: Any, value: Array) -> Array:
        return jax.device_put(value, here if mesh is None else NamedSharding(mesh, spec))

    # One array after the other, so that no more than one is there twice.
    nnx.update(moved, jax.tree.map(place, moved.partition_specs(), nnx.state(moved), is_leaf=_is_spec))
    return moved


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)


def _slot_of_each_expert(layer: MoERunner) -> np.ndarray:
    """One physical slot of each logical expert, the first."""
    if layer.replicas is None:
        return np.arange(layer.config.num_experts)
    return np.asarray(layer.replicas.logical_to_physical[...])[:, 0]


def _fill_slots(experts: Any, source: np.ndarray) -> None:
    """Let each physical slot hold what was in the slot that `source` names."""
    for name in ExpertWeights._fields:
        parameter = getattr(experts, name)
        if parameter is not None:
            setattr(experts, name, type(parameter)(parameter[...][source]))
