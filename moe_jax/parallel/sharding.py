"""How the parameters of a layer are split over its mesh axes."""

from typing import Any

from jax.sharding import PartitionSpec

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


def shared_expert_spec(axes: LayerAxes, path: tuple[Any, ...]) -> PartitionSpec:
    """How the parameter of `SharedExperts` at `path` is split: the intermediate size over ranks with the same tokens.

    Ranks with different tokens each need all of it, as in upstream, where shared experts are split tensor-parallel only.
    """
    return {
        ("gate_proj", "kernel"): axes.spec((), axes.partial),
        ("up_proj", "kernel"): axes.spec((), axes.partial),
        ("down_proj", "kernel"): axes.spec(axes.partial, ()),
        ("gate_proj", "bias"): axes.spec(axes.partial),
        ("up_proj", "bias"): axes.spec(axes.partial),
    }.get(tuple(path), PartitionSpec())
