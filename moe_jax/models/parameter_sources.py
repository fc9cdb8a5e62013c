"""How a model's parameters, stacked for scanning, correspond to those of single layers in `parameter_shapes`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moe_jax.config import MoEConfig
from moe_jax.device_layouts import Home, home_row_by_row
from moe_jax.experts.replicas import PlacementTable, ReplicaMap
from moe_jax.families.decoder import Decoder
from moe_jax.models.partitioning import Partitioning

if TYPE_CHECKING:
    from moe_jax.models.causal_lm import CausalLM

StatePath = tuple[Any, ...]
"""Path of a parameter in `nnx.state(model)`."""


def parameter_sources(model: "CausalLM") -> Mapping[StatePath, str | tuple[str, ...]]:
    """Path of every parameter in the model -> its path in our tree, or one path per layer that is stacked in it.

    Tables of the expert placement are no parameters: see `expert_placements`.
    """
    flat = nnx.to_flat_state(nnx.state(model))
    return {path: _source(model, path) for path, variable in flat if not isinstance(variable, PlacementTable)}


def expert_placements(model: "CausalLM") -> Mapping[StatePath, ReplicaMap]:
    """Path of each stack of MoE layers whose slots are not simply their experts in order -> its placement tables."""
    placements: dict[StatePath, ReplicaMap] = {}
    for index, stack in enumerate(model.stacks):
        for position in stack.moe_positions:
            mixture: Any = stack.blocks[position].feed_forward
            if mixture.replicas is not None:
                placements["stacks", index, "blocks", position, "feed_forward"] = mixture.replicas
    return placements


def parameter_shardings(model: "CausalLM") -> Mapping[StatePath, Sharding]:
    """Where every parameter lives: MoE layers as their `partition_specs` say, the rest as `model.partitioning` does.

    Without a mesh, everything is on the default device.
    """
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    if model.partitioning is None:
        return dict.fromkeys(paths, jnp.zeros(()).sharding)
    specs = {
        path: model.partitioning.parameter_spec(".".join(map(str, path)), model.decoder)
        for path in paths
        if path[0] != "stacks"
    }
    for index, stack in enumerate(model.stacks):
        for position, block in enumerate(stack.blocks):
            first = stack.segment.layers_at(position)[0]
            layer_specs = layer_partition_specs(block, first, model.decoder, model.partitioning)
            prefix = ("stacks", index, "blocks", position)
            specs |= {(*prefix, *path): PartitionSpec(None, *spec) for path, spec in layer_specs.items()}
    return {path: NamedSharding(model.partitioning.mesh, spec) for path, spec in specs.items()}


def parameter_homes(model: "CausalLM", *, without_mesh: Sharding | None = None) -> Mapping[StatePath, Home]:
    """Where every parameter lives, and how those lie there that are read by rows.

    Args:
        model: whose parameters.
        without_mesh: where all of them live if the model has no mesh; None: on the default device.
    """
    shardings = parameter_shardings(model)
    if model.partitioning is None and without_mesh is not None:
        shardings = dict.fromkeys(shardings, without_mesh)
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    return {
        path: home_row_by_row(sharding, variables[path].ndim) if is_read_by_rows(path) else sharding
        for path, sharding in shardings.items()
    }


def is_read_by_rows(path: StatePath) -> bool:
    """Whether kernels, or the lookup of tokens, read the rows of a parameter one by one."""
    return is_expert_matrix(path) or path == ("embedder", "embedding")


def is_expert_matrix(path: StatePath) -> bool:
    """Whether a parameter is a projection of routed experts; `path` may be that in a layer, too."""
    return path[-2:] in (("routed_experts", "gate_up_proj"), ("routed_experts", "down_proj"))


def layer_partition_specs(
    block: Any, layer: int, decoder: Decoder, partitioning: Partitioning
) -> Mapping[StatePath, PartitionSpec]:
    """How each parameter of a decoder layer is split, without the axis of stacked layers.

    Args:
        block: the `DecoderLayer`, or several that are stacked.
        layer: which layer of `decoder` it is; of stacked ones the first.
        decoder: the model's description.
        partitioning: how everything outside the MoE layer is split.
    """
    specs: dict[StatePath, PartitionSpec] = {}
    if isinstance(decoder.layers[layer].feed_forward, MoEConfig):
        specs = {
            ("feed_forward", *path): spec for path, spec in nnx.to_flat_state(block.feed_forward.partition_specs())
        }
    for path, _ in nnx.to_flat_state(nnx.state(block)):
        if path not in specs:
            specs[path] = partitioning.parameter_spec(".".join(map(str, ("layers", layer, *path))), decoder)
    return specs


def _source(model: "CausalLM", path: StatePath) -> str | tuple[str, ...]:
    match path:
        case ("stacks", stack, "blocks", position, *rest):
            leaf = ".".join(map(str, rest))
            return tuple(f"layers.{i}.{leaf}" for i in model.stacks[stack].segment.layers_at(position))
        case _:
            return ".".join(map(str, path))
