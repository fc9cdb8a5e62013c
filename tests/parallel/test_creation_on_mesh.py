"""Where the parameters of a layer lie that is created on a mesh, by itself or inside of a transformation."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import MoEConfig, MoERunner, ParallelConfig, RoutedExperts, RouterConfig, SharedExpertsConfig
from moe_jax.config import GroupLimit
from moe_jax.runner.physical_experts import expert_map_manager, initial_placement

CONFIG = MoEConfig(
    hidden_size=16,
    intermediate_size=8,
    num_experts=6,
    num_redundant_experts=2,
    top_k=2,
    shared_experts=SharedExpertsConfig(intermediate_size=8),
    parallel=ParallelConfig(expert_axis="expert", data_axis="data"),
)


def create(rngs: nnx.Rngs, mesh: Mesh) -> MoERunner:
    return MoERunner(CONFIG, mesh=mesh, rngs=rngs)


def mesh_of(axis_type: AxisType) -> Mesh:
    return jax.make_mesh((2, 4), ("data", "expert"), axis_types=(axis_type,) * 2)


def check_specs(layer: MoERunner, mesh: Mesh, *stacked: None) -> None:
    """Every parameter lies as the specs of one layer say, behind unsplit axes of stacked layers."""
    specs = dict(nnx.to_flat_state(create(nnx.Rngs(0), mesh).partition_specs()))
    arrays = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(layer))}
    assert len(arrays) == 9
    assert arrays.keys() == specs.keys()
    for path, array in arrays.items():
        sharding = NamedSharding(mesh, PartitionSpec(*stacked, *specs[path]))
        assert array.sharding.is_equivalent_to(sharding, array.ndim), (path, array.sharding)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_parameters_created_by_jit_lie_as_the_partition_specs_say(axis_type):
    mesh = mesh_of(axis_type)
    check_specs(create(nnx.Rngs(0), mesh), mesh)
    # jit wants to be told the devices of an Explicit mesh.
    with contextlib.nullcontext() if axis_type == AxisType.Auto else jax.set_mesh(mesh):
        check_specs(nnx.jit(create, static_argnums=1)(nnx.Rngs(0), mesh), mesh)


@pytest.mark.parametrize(("strategy", "redundant"), [("linear", 0), ("linear", 2), ("round_robin", 0)])
def test_a_layer_starts_with_the_same_experts_on_a_mesh_on_one_device_and_on_each_rank_alone(strategy, redundant):
    groups = RouterConfig(group_limit=GroupLimit(num_groups=2, groups_kept=1, score="max"))
    alone = dataclasses.replace(CONFIG, num_redundant_experts=redundant, router=groups, parallel=ParallelConfig())
    split = ParallelConfig(expert_axis="expert", placement_strategy=strategy)
    expected = RoutedExperts(alone, rngs=nnx.Rngs(7))
    assert len(np.unique(np.asarray(expected.down_proj[:6]))) == expected.down_proj[:6].size
    layer = MoERunner(
        dataclasses.replace(alone, parallel=split), mesh=jax.make_mesh((2,), ("expert",)), rngs=nnx.Rngs(7)
    )
    placement = initial_placement(layer.config, layer.axes)
    assert (placement.tolist() == list(range(6))) == (strategy == "linear" and not redundant)
    single = MoERunner(alone, rngs=nnx.Rngs(7))
    for name in ("gate_up_proj", "down_proj"):
        whole = np.asarray(getattr(single.routed_experts, name))
        np.testing.assert_array_equal(np.asarray(getattr(layer.routed_experts, name)), whole[:6][placement])
    for rank in range(2):
        manager = expert_map_manager(layer.config, layer.axes, rank)
        held = RoutedExperts(alone, expert_map_manager=manager, rngs=nnx.Rngs(7))
        of_rank = np.asarray(expected.down_proj)[manager.get_local_expert_ids()]
        np.testing.assert_array_equal(np.asarray(held.down_proj), of_rank)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("num_layers", [3, 4])
def test_layers_stacked_by_vmap_are_split_by_experts_and_not_by_layers(num_layers, axis_type):
    mesh = mesh_of(axis_type)
    layers = nnx.vmap(lambda rngs: create(rngs, mesh))(nnx.Rngs(0).split(num_layers))
    check_specs(layers, mesh, None)


def test_a_step_that_returns_the_layer_is_traced_once():
    mesh = mesh_of(AxisType.Auto)
    layer, traces = create(nnx.Rngs(0), mesh), []

    @nnx.jit
    def step(layer, x):
        traces.append(x.shape)
        gradients = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
        nnx.update(
            layer, jax.tree.map(lambda value, slope: value - 0.1 * slope, nnx.state(layer, nnx.Param), gradients)
        )

    for _ in range(3):
        step(layer, jnp.ones((8, 16)))
    assert traces == [(8, 16)]
