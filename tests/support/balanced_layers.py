"""Layers with redundant experts on simulated devices, and the same layer without copies on one."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from oracles.layers_under_test import random_layer

from moe_jax import MoEConfig, MoERunner, ParallelConfig


def make_mesh(*sizes, names=("expert", "tensor", "data")):
    count = int(np.prod(sizes))
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=kinds, devices=jax.devices()[:count])


def config(**changes) -> MoEConfig:
    base = dict(
        hidden_size=6, intermediate_size=4, num_experts=8, top_k=2, expert_bias=True, implementation="reference"
    )
    return MoEConfig(**(base | changes))


def plain_and_balanced(rng, mesh, parallel=ParallelConfig(expert_axis="expert"), redundant=8, **changes):
    """The same layer twice: alone without copies, and split over `mesh` with copies of some experts."""
    plain = random_layer(rng, config(**changes))
    settings = dataclasses.replace(config(**changes), num_redundant_experts=redundant, parallel=parallel)
    values = nnx.state(random_layer(rng, dataclasses.replace(settings, parallel=ParallelConfig())))
    slots = np.asarray(values["replicas"]["physical_to_logical"][...]) if redundant else slice(None)
    for name, weights in nnx.state(plain)["routed_experts"].items():
        values["routed_experts"][name][...] = weights[...][slots]
    values["router"] = nnx.state(plain)["router"]
    return plain, random_layer(rng, settings, values=values, mesh=mesh)


def logical_experts(layer: MoERunner) -> dict[str, np.ndarray]:
    """Expert weights in the order of the logical experts; copies must be equal in every bit."""
    placement = np.asarray(layer.replicas.physical_to_logical[...])
    first = [np.flatnonzero(placement == expert)[0] for expert in range(layer.config.num_experts)]
    result = {}
    for name, variable in nnx.state(layer)["routed_experts"].items():
        values = np.asarray(variable[...])
        np.testing.assert_array_equal(values, values[first][placement], err_msg=f"copies of {name}")
        result[name] = values[first]
    return result
