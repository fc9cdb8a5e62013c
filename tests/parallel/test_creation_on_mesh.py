"""Where the parameters of a layer lie that is created on a mesh, by itself or inside of a transformation."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import MoEConfig, MoERunner, ParallelConfig, SharedExpertsConfig

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
