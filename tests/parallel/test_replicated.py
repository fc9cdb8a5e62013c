"""The replicated strategy on eight simulated devices: forward and gradients equal those of the layer on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles.layers_under_test import call
from support.sharded_layers import (
    PARALLEL,
    SHARED,
    assert_equal_forward_and_backward,
    layer_pair,
    make_mesh,
    small_config,
    transforms,
)

from moe_jax import (
    ExpertMapManager,
    MoERunner,
    ParallelConfig,
    RoutedExperts,
    RouterConfig,
    SharedExpertsConfig,
)
from moe_jax.placement import ParallelRanks


def test_zero_experts_and_the_scaling_factor_enter_the_sum_once(rng):
    router = RouterConfig(num_zero_experts=3, renormalize=False, routed_scaling_factor=2.0)
    single, sharded = layer_pair(rng, small_config(router=router), make_mesh(1, 2, 2))
    x = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)
    assert_equal_forward_and_backward(single, sharded, x, rng)


def test_sharded_layer_runs_on_a_mesh_with_explicit_axes(rng):
    mesh = make_mesh(2, 2, 2, AxisType.Explicit)
    single, sharded = layer_pair(rng, small_config(shared_experts=SHARED), mesh)
    x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
    assert_equal_forward_and_backward(single, sharded, x, rng, context=lambda: jax.set_mesh(mesh))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        result = jax.eval_shape(lambda x: sharded(x), placed)
    assert result.sharding.spec == PartitionSpec("data", None, None)


def test_unreduced_results_on_a_mesh_with_explicit_axes_are_split_over_their_ranks(rng):
    mesh = make_mesh(2, 2, 2, AxisType.Explicit)
    parallel = dataclasses.replace(PARALLEL, reduce_results=False)
    single, sharded = layer_pair(rng, small_config(shared_experts=SHARED), mesh, parallel)
    x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
    with jax.set_mesh(mesh):
        y = call(sharded, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert y.sharding.spec == PartitionSpec(("expert", "tensor"), "data", None, None)
    np.testing.assert_allclose(np.asarray(y, np.float64).sum(axis=0), call(single, x), rtol=1e-5, atol=1e-5)


def test_another_mesh_around_the_call_is_refused(rng):
    _, sharded = layer_pair(rng, small_config(), make_mesh(1, 2, 2))
    with (
        jax.set_mesh(make_mesh(2, 2, 1)),
        pytest.raises(ValueError, match="the layer's mesh has axes .*, the one that"),
    ):
        sharded(jnp.ones((3, 6)))


def test_chosen_implementation_runs_sharded(rng):
    settings = small_config(shared_experts=SHARED, implementation=None)
    single, sharded = layer_pair(rng, settings, make_mesh(1, 2, 2))
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    np.testing.assert_allclose(call(sharded, x), call(single, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["no tokens", "all on one expert"])
def test_ranks_without_any_row_are_legal(case, rng):
    single, sharded = layer_pair(rng, small_config(shared_experts=SHARED), make_mesh(2, 2, 1))
    x = jnp.asarray(rng.normal(size=(0 if case == "no tokens" else 5, 6)), jnp.float32)
    ids = jnp.broadcast_to(jnp.array([6, 6], jnp.int32), (len(x), 2))
    y, aux = call(sharded, x, forced_ids=ids, with_aux=True)
    np.testing.assert_allclose(y, call(single, x, forced_ids=ids), rtol=1e-5, atol=1e-5)
    assert aux.expert_load.tolist() == [0, 0, 0, 0, 0, 0, 2 * len(x), 0]


def test_layer_outside_of_jit_equals_the_layer_inside(rng):
    _, sharded = layer_pair(rng, small_config(shared_experts=SHARED), make_mesh(1, 2, 2))
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    np.testing.assert_allclose(sharded(x), call(sharded, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shared", "transform"),
    [
        (True, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, True), (False, False), (False, True)]),
    ],
)
def test_unreduced_results_sum_to_the_layer_unless_the_plan_reduced_them(shared, transform, rng):
    parts = transforms() if transform else {}
    parallel = ParallelConfig(expert_axis="expert", tensor_axis="tensor", strategy="replicated", reduce_results=False)
    settings = small_config(shared_experts=SHARED if shared else None)
    single, sharded = layer_pair(rng, settings, make_mesh(1, 2, 2), parallel, **parts)
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    y = call(sharded, x)
    assert sharded.reduction_plan.result_is_partial == (not transform)
    assert y.shape == ((3, 6) if transform else (4, 3, 6))
    whole = y if transform else np.asarray(y, np.float64).sum(axis=0)
    np.testing.assert_allclose(whole, call(single, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(1, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(1, 1, 8), (1, 8, 1)])], ids=str
)
def test_down_bias_enters_the_sum_once(sizes, rng):
    _, sharded = layer_pair(rng, small_config(shared_experts=SHARED), make_mesh(*sizes))
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(sharded))
    nnx.update(sharded, zeros)
    sharded.routed_experts.down_bias[...] += 3.0
    sharded.shared_experts.down_proj.bias[...] += 10.0
    y = call(sharded, jnp.ones((2, 6)))
    np.testing.assert_allclose(y, np.full((2, 6), 3.0 + 10.0 / 2))  # the sigmoid gate of zero is a half


def test_parameters_are_created_split_over_the_mesh():
    layer = MoERunner(small_config(shared_experts=SHARED, parallel=PARALLEL), rngs=nnx.Rngs(0), mesh=make_mesh(2, 2, 2))
    experts, shared = layer.routed_experts, layer.shared_experts
    assert experts.gate_up_proj[...].sharding.shard_shape((8, 2, 8, 6)) == (4, 2, 4, 6)
    assert experts.down_proj[...].sharding.shard_shape((8, 6, 8)) == (4, 6, 4)
    assert shared.up_proj.kernel[...].sharding.shard_shape((6, 8)) == (6, 2)
    assert shared.down_proj.kernel[...].sharding.shard_shape((8, 6)) == (2, 6)
    assert layer.router.weight[...].sharding.is_fully_replicated


def build(mesh_sizes=(2, 2, 2), parallel=PARALLEL, **changes):
    parts = {name: changes.pop(name) for name in ("routed_experts", "shared_experts") if callable(changes.get(name))}
    settings = small_config(parallel=parallel, **changes)
    return nnx.eval_shape(lambda: MoERunner(settings, rngs=nnx.Rngs(0), mesh=make_mesh(*mesh_sizes), **parts))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_experts=7), r"the 2 ranks of expert_axis=.* must divide the physical experts .* got 7 \+ 0"),
        (dict(intermediate_size=9), "the 2 ranks of tensor_axis=.* must divide intermediate_size, got 9"),
        (dict(shared_experts=SharedExpertsConfig(intermediate_size=6)), "the 4 ranks .* shared experts, got 6"),
        (dict(parallel=ParallelConfig(expert_axis="model")), r"must be axes of the mesh \('data', .*got 'model'"),
        (dict(parallel=ParallelConfig(expert_axis="data", tensor_axis="data")), "must not share .* got 'data' twice"),
        (dict(parallel=ParallelConfig(sequence_axis="data", data_axis="data")), "must not share .* got 'data' twice"),
    ],
)
def test_layer_that_cannot_be_split_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_shared_experts_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match=r"shared_experts must be a SharedExperts.* got Linear"):
        build(shared_experts=nnx.eval_shape(lambda: nnx.Linear(6, 6, rngs=nnx.Rngs(0))))


def test_layer_with_the_experts_of_one_rank_only_is_refused():
    manager = ExpertMapManager(global_num_experts=8, ranks=ParallelRanks(ep_size=2, ep_rank=0, use_ep=True))
    experts = nnx.eval_shape(lambda: RoutedExperts(small_config(), expert_map_manager=manager, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="must hold every expert of the layer, .* got those of rank 0 of 2"):
        MoERunner(
            small_config(parallel=PARALLEL),
            rngs=nnx.Rngs(0),
            mesh=make_mesh(2, 2, 2),
            routed_experts=experts,
            router=nnx.eval_shape(lambda: nnx.Linear(6, 8, rngs=nnx.Rngs(0))),
        )
