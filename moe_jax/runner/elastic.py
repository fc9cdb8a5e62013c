"""Going from n to m ranks: a layer's parameters are placed anew, from device to device, without reading a checkpoint again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int, Shaped

from moe_jax.config import MoEConfig, ParallelConfig
from moe_jax.experts import EXPERT_PARAMETERS
from moe_jax.experts.replicas import ReplicaMap
from moe_jax.parallel import LayerAxes
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
    move = plan_layer_move(layer, mesh, parallel, num_redundant_experts=num_redundant_experts)
    home = whole_on_first_device(None if layer.axes is None else layer.axes.mesh)
    moved = nnx.merge(*nnx.split(layer), copy=True)  # of variables, which would be shared otherwise, not of arrays
    move.apply_to(moved)

    def place(path: tuple[Any, ...], spec: Any, value: Array) -> Array:
        if move.source is not None and path[0] == "routed_experts" and path[1] in EXPERT_PARAMETERS:
            value = take_slots(value, move.source)
        return jax.device_put(value, home if mesh is None else NamedSharding(mesh, spec))

    # One array after the other, so that no more than one is there twice.
    specs = dict(nnx.to_flat_state(moved.partition_specs()))
    nnx.update(moved, nnx.map_state(lambda path, value: place(path, specs[path], value), nnx.state(moved)))
    return moved


@dataclasses.dataclass(frozen=True)
class LayerMove:
    """What changes in a layer that goes to other devices, beside where its arrays are."""

    config: MoEConfig
    axes: LayerAxes | None
    source: Int[np.ndarray, "P"] | Int[np.ndarray, "L P"] | None
    """The slot whose content each slot takes, of stacked layers a row for each; None: every slot keeps its own."""

    def apply_to(self, layer: MoERunner) -> None:
        """Change config, axes and placement tables of the layer, in place; its arrays stay where they are."""
        layer.config, layer.axes = self.config, self.axes
        if self.source is not None:
            replicas = initial_replicas(self.config, self.axes)
            if replicas is not None and self.source.ndim > 1:
                stacked = np.tile(replicas.physical_to_logical[...], (len(self.source), 1))
                replicas = ReplicaMap(stacked, self.config.num_experts)
            layer.replicas = nnx.data(replicas)


def plan_layer_move(
    layer: MoERunner,
    mesh: Mesh | None,
    parallel: ParallelConfig | None,
    *,
    num_redundant_experts: int | None,
    num_stacked: int | None = None,
) -> LayerMove:
    """What `move_layer` with these arguments changes; nothing is moved.

    Args:
        layer: one layer, or several that are stacked.
        mesh: where it goes.
        parallel: how `mesh` splits it; None: as before.
        num_redundant_experts: how many redundant experts there are then; None: as many as before.
        num_stacked: how many layers are stacked; None: there is no axis of layers.

    Raises:
        ValueError: `mesh` cannot split the layer evenly, or lacks an axis.
    """
    if mesh is None and parallel is None:
        parallel = ParallelConfig()
    before = layer.config
    redundant = before.num_redundant_experts if num_redundant_experts is None else num_redundant_experts
    config = dataclasses.replace(before, parallel=parallel or before.parallel, num_redundant_experts=redundant)
    axes = resolve_axes(config, mesh)
    old_slots, new_slots = initial_placement(before, layer.axes), initial_placement(config, axes)
    source = None
    if not np.array_equal(old_slots, new_slots):
        source = _slot_of_each_expert(layer)[..., new_slots]
        if num_stacked is not None:
            source = np.broadcast_to(source, (num_stacked, len(new_slots)))
    move = LayerMove(config, axes, source)
    graph, state = nnx.split(layer)
    if num_stacked is not None:
        state = nnx.map_state(lambda _, array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), state)
    trial = nnx.merge(graph, state)
    move.apply_to(trial)
    trial.check_parts()
    return move


def _slot_of_each_expert(layer: MoERunner) -> Int[np.ndarray, "... E"]:
    """One physical slot of each logical expert, the first."""
    if layer.replicas is None:
        return np.arange(layer.config.num_experts)
    return np.asarray(layer.replicas.logical_to_physical[...])[..., 0]


@jax.jit
def take_slots(
    experts: Shaped[Array, "P ..."] | Shaped[Array, "L P ..."],
    source: Int[Array, "S"] | Int[Array, "L S"] | Int[np.ndarray, "..."],
) -> Array:
    """An array in which each slot holds what was in the slot that `source` names."""
    if source.ndim == 1:
        return experts[source]
    return jnp.take_along_axis(experts, source.reshape(*source.shape, *[1] * (experts.ndim - 2)), axis=1)


def whole_on_first_device(mesh: Mesh | None) -> Sharding:
    """Where arrays go that leave `mesh`: its first device, or without one the default device."""
    return SingleDeviceSharding(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
