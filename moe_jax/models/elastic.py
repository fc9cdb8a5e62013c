"""Going from n to m ranks: a model's parameters are placed anew, from device to device, without reading a checkpoint again."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from moe_jax.config import ParallelConfig
from moe_jax.device_layouts import Home, moved_to, sharding_of, write_in_place, zeros
from moe_jax.experts import EXPERT_PARAMETERS
from moe_jax.models.causal_lm import CausalLM
from moe_jax.models.parameter_sources import StatePath, parameter_homes
from moe_jax.models.partitioning import Partitioning
from moe_jax.parallel import parallel_of, with_auto_axes
from moe_jax.runner.elastic import LayerMove, plan_layer_move, take_slots, whole_on_first_device

BLOCK_BYTES = 256 * 2**20
"""Most bytes of a stacked parameter that move at once, unless one layer of it is larger."""


def move_model(
    model: CausalLM,
    mesh: Mesh | None,
    parallel: ParallelConfig | None = None,
    *,
    num_redundant_experts: int | None = None,
) -> None:
    """Move a model to other devices, in place: what was split over n ranks is then split over m.

    Weights keep their bits. A placement that load balancing has found is kept if there are as many slots as before; otherwise,
    and under `round_robin`, which depends on the number of ranks, slots are filled anew, as in a fresh model. What else belongs
    to the old mesh doesn't move: caches, optimizers, and an `ExpertLoadBalancer` with its state have to be made anew.

    Parameters move one after the other, and stacked ones in blocks of layers of up to `BLOCK_BYTES`, at least one layer. So if
    nobody else holds the old arrays, devices hold beside the model no more than one parameter a second time, and a block of it,
    which each of them may hold whole while slots are filled anew. If the set of devices changes, jax takes blocks through the
    host's memory.

    Args:
        model: on any mesh, or none. If an error is raised because `mesh` doesn't fit, it is as it was.
        mesh: where it goes; None: the first device of its mesh. On several processes, a mesh of the same devices.
        parallel: how `mesh` splits it, see `CausalLM`; None: as before if the axes have the names that they had before, or else as
            their names say, see `from_pretrained`.
        num_redundant_experts: how many redundant experts every MoE layer has then; None: as many as before.

    Raises:
        ValueError: `mesh` cannot split the layers evenly or lacks an axis, or `parallel` is given without a mesh.
    """
    if mesh is None and parallel is not None:
        raise ValueError(f"parallel needs a mesh, got None with {parallel}")
    mesh = None if mesh is None else with_auto_axes(mesh)
    if parallel is None:
        parallel = _parallel_on(mesh, model)
    moves = _plan(model, mesh, parallel, num_redundant_experts)
    first_device = whole_on_first_device(model.mesh)

    model.mesh, model.parallel = mesh, parallel
    model.partitioning = None if mesh is None else Partitioning.of(parallel, mesh)
    for stack in model.stacks:
        stack.partitioning = model.partitioning
    for (_, index, _, position, _), move in moves.items():
        mixture: Any = model.stacks[index].blocks[position].feed_forward
        move.apply_to(mixture)

    homes = parameter_homes(model, without_mesh=first_device)
    for path, variable in _variables(model):
        home = homes[path]
        array = variable.get_value()
        if path[0] == "stacks":
            move, is_expert = moves.get(path[:5]), path[5:6] == ("routed_experts",) and path[6] in EXPERT_PARAMETERS
            array = _moved_in_blocks(array, home, move.source if move is not None and is_expert else None)
        else:
            array = moved_to(array, home)
        variable.set_value(array)


def _parallel_on(mesh: Mesh | None, model: CausalLM) -> ParallelConfig:
    """How `mesh` splits the model if nobody says so."""
    if mesh is None:
        return ParallelConfig()
    if model.mesh is not None and model.mesh.axis_names == mesh.axis_names:
        return model.parallel
    return parallel_of(mesh)


def _plan(
    model: CausalLM, mesh: Mesh | None, parallel: ParallelConfig, num_redundant_experts: int | None
) -> dict[StatePath, LayerMove]:
    """Path of each stack of MoE layers -> what changes in it."""
    moves: dict[StatePath, LayerMove] = {}
    for index, stack in enumerate(model.stacks):
        for position in stack.moe_positions:
            mixture: Any = stack.blocks[position].feed_forward
            moves["stacks", index, "blocks", position, "feed_forward"] = plan_layer_move(
                mixture,
                mesh,
                parallel,
                num_redundant_experts=num_redundant_experts,
                num_stacked=stack.segment.repeats,
            )
    return moves


def _variables(model: CausalLM) -> list[tuple[StatePath, nnx.Variable[Array]]]:
    """Every parameter and table by its path, not its array, which would then live on."""
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)]


def _moved_in_blocks(
    array: Shaped[Array, "L ..."], home: Home, source: Int[np.ndarray, "L S"] | None
) -> Shaped[Array, "L ..."]:
    """`array` on other devices; with `source`, of experts `[L, P, ...]`, each slot holds what was in the slot named there."""
    num_layers = array.shape[0]
    layers = min(num_layers, max(1, BLOCK_BYTES * num_layers // max(1, array.nbytes)))
    if layers == num_layers:
        return moved_to(array if source is None else take_slots(array, source), home)
    shape = array.shape if source is None else (*source.shape, *array.shape[2:])
    moved = zeros(shape, array.dtype, home)
    for start in range(0, num_layers, layers):
        block = _layers(array, start, min(layers, num_layers - start))
        if source is not None:
            block = take_slots(block, source[start : start + layers])
        moved = write_in_place(moved, jax.device_put(block, sharding_of(home)), (start, *[0] * (moved.ndim - 1)))
    return moved


@functools.partial(jax.jit, static_argnames="count")
def _layers(array: Shaped[Array, "L ..."], start: int, count: int) -> Shaped[Array, "count ..."]:
    """`count` layers from `start` on."""
    return jax.lax.dynamic_slice_in_dim(array, start, count)
