"""How the parameters of a layer are split over its mesh axes."""

import dataclasses
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from moe_jax.experts.weights import ExpertWeights
from moe_jax.parallel.axes import LayerAxes


def expert_weight_specs(axes: LayerAxes) -> ExpertWeights:
    """How `ExpertWeights` are split: experts over the expert axes, intermediate size over the tensor axes."""
    spec: Any = axes.spec  # a spec stands where an array will
    return ExpertWeights(
        gate_up_proj=spec(axes.expert, (), axes.tensor, ()),
        down_proj=spec(axes.expert, (), axes.tensor),
        gate_up_bias=spec(axes.expert, (), axes.tensor),
        down_bias=spec(axes.expert, ()),
    )


def fused_shared_expert_specs(axes: LayerAxes) -> ExpertWeights:
    """How shared experts that are fused with the routed ones are split: as these, but every expert rank has them."""
    return expert_weight_specs(dataclasses.replace(axes, expert=()))


def shared_expert_spec(axes: LayerAxes, path: tuple[Any, ...], *, is_fused: bool = False) -> PartitionSpec:
    """How the parameter of `SharedExperts` at `path` is split: the intermediate size over ranks with the same tokens.

    Ranks with different tokens each need all of it, as in upstream, where shared experts are split tensor-parallel only.
    Fused with the routed experts, shared ones are split over the same ranks as each of these.
    """
    split = axes.tensor if is_fused else axes.partial
    return {
        ("gate_proj", "kernel"): axes.spec((), split),
        ("up_proj", "kernel"): axes.spec((), split),
        ("down_proj", "kernel"): axes.spec(split, ()),
        ("gate_proj", "bias"): axes.spec(split),
        ("up_proj", "bias"): axes.spec(split),
    }.get(tuple(path), PartitionSpec())


def placed(parameter: Any, sharding: Sharding) -> Any:
    """An array or `nnx.Variable` with this sharding, also in a traced function, where `jax.device_put` would change nothing."""
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(parameter)):
        return jax.device_put(parameter, sharding)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(parameter, sharding)
    # `with_sharding_constraint` would refuse Auto axes while Explicit ones are current.
    return jax.jit(lambda value: value, out_shardings=sharding)(parameter)
