"""Training with redundant experts: all copies of an expert get the gradient of the expert."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.experts.replicas import ReplicaMap
from moe_jax.kernels.integers import slice_starts
from moe_jax.load_balancing.exchange import ExpertSharding, on_every_rank
from moe_jax.load_balancing.layers import BalancedLayers, find_expert_arrays, partition_of, stacked_rows


def sum_replica_gradients(model: nnx.Module, gradients: Any, layers: tuple[BalancedLayers, ...]) -> Any:
    """Replace every copy's gradient by the sum over the copies of its expert; other gradients stay as they are.

    A token passes one copy, so a copy's gradient is that of its tokens only. The expert's own gradient is the sum, and
    with it in every place an optimizer keeps the copies equal, its moments included. For use in `jax.jit`: ranks
    exchange one row after the other of the experts that have copies, and nothing else.

    Args:
        model: the model; its placement tables say which slots are copies.
        gradients: a tree in which the paths of the expert weights occur, such as an `nnx.State`.
        layers: what `find_layers` found in the model.

    Returns:
        The gradients in the same tree.

    Raises:
        ValueError: a layer without placement tables (`layer.replicas`; an `ExpertLoadBalancer` of the model adds them), or a
            gradient of expert weights without the axis of physical experts.
    """
    leaves, structure = jax.tree.flatten(gradients)
    for arrays in list(find_expert_arrays(gradients, layers, num_physical_experts(model, layers))):
        replicas = placement_of(model, arrays.layers)
        tables = (replicas.logical_to_physical[...], replicas.replica_count[...])
        leaves[arrays.leaf] = sum_over_copies(
            leaves[arrays.leaf],
            *(stacked_rows(table, arrays.layers) for table in tables),
            sharding=partition_of(model, arrays),
        )
    return jax.tree.unflatten(structure, leaves)


def sum_over_copies(
    experts: Float[Array, "L P ..."] | Float[Array, "P ..."],
    logical_to_physical: Int[Array, "L E R"],
    replica_count: Int[Array, "L E"],
    *,
    sharding: ExpertSharding,
) -> Array:
    """In every slot, the sum over the slots that hold the same expert; the same bits in all of them.

    Summed in float32 at least and rounded once: the gradient of an expert without copies is not rounded on its way either.
    """
    axes = sharding.expert_axes
    wide = jnp.promote_types(experts.dtype, jnp.float32)
    most_copied = logical_to_physical.shape[2] - 1  # so many experts can have copies

    def add_up(local, logical_to_physical, replica_count):
        slots = local.shape[1]
        first_slot = jax.lax.axis_index(axes) * slots if axes else 0

        def in_layer(layer, local):
            counts, experts = jax.lax.top_k(replica_count[layer], min(most_copied, replica_count.shape[1]))

            def of_expert(place, local):
                held_in = logical_to_physical[layer, experts[place]] - first_slot
                is_local = (held_in >= 0) & (held_in < slots)
                held_in = jnp.clip(held_in, 0, slots - 1)

                def row_of(copy, local):
                    at = slice_starts(layer, held_in[copy], *[0] * (local.ndim - 2))
                    return at, jax.lax.dynamic_slice(local, at, (1, 1, *local.shape[2:]))

                def add(copy, total):
                    return total + jnp.where(is_local[copy], row_of(copy, local)[1].astype(wide), 0)

                def put(copy, carry):
                    total, local = carry
                    at, row = row_of(copy, local)
                    return total, jax.lax.dynamic_update_slice(local, jnp.where(is_local[copy], total, row), at)

                total = jnp.zeros((1, 1, *local.shape[2:]), wide)
                total = jax.lax.fori_loop(0, counts[place], add, total)
                total = (jax.lax.psum(total, axes) if axes else total).astype(local.dtype)
                return jax.lax.fori_loop(0, counts[place], put, (total, local))[1]

            return jax.lax.fori_loop(0, (counts > 1).sum(), of_expert, local) if most_copied else local

        return jax.lax.fori_loop(0, local.shape[0], in_layer, local)

    return on_every_rank(add_up, sharding)(experts, logical_to_physical, replica_count)


def placement_of(model: nnx.Module, layers: BalancedLayers) -> ReplicaMap:
    """The placement tables of a layer.

    Raises:
        ValueError: it has none.
    """
    replicas = layers.module(model).replicas
    if replicas is None:
        raise ValueError(
            f"the layer {'.'.join(map(str, layers.path)) or 'itself'} must have placement tables (layer.replicas); "
            "an ExpertLoadBalancer of the model adds them"
        )
    return replicas


def num_physical_experts(model: nnx.Module, layers: tuple[BalancedLayers, ...]) -> int:
    """Slots of each layer."""
    return layers[0].module(model).config.num_physical_experts
