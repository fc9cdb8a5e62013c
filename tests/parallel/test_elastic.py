"""From n to m ranks and back: parameters keep their bits, and outputs are those of a layer built there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from oracles.layers_under_test import call, random_layer
from support.sharded_layers import SHARED, make_mesh, sharded_like, small_config

from moe_jax import GroupLimit, ParallelConfig, RouterConfig
from moe_jax.runner.elastic import move_layer

PARALLEL = ParallelConfig(
    strategy="ragged_all_to_all", expert_axis="expert", tensor_axis="tensor", sequence_axis="expert"
)


def assert_same_bits(one, other):
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(layer)) for layer in (one, other)), strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


@pytest.mark.parametrize("sizes", [((2, 2),), pytest.param(((8, 1), (4, 2), (1, 1)), marks=pytest.mark.slow)], ids=str)
def test_outputs_and_weights_keep_their_bits_through_any_number_of_ranks(sizes, rng):
    single = random_layer(rng, small_config(shared_experts=SHARED, num_redundant_experts=8))
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    layer = single
    for expert, tensor in sizes:
        mesh = make_mesh(1, expert, tensor)
        layer = move_layer(layer, mesh, PARALLEL)
        assert layer.routed_experts.gate_up_proj[...].sharding.shard_shape((16, 2, 8, 6))[0] == 16 // expert
        fresh = sharded_like(single, mesh, PARALLEL)
        assert_same_bits(layer, fresh)
        np.testing.assert_array_equal(call(layer, x), call(fresh, x))
    back = move_layer(layer, None)
    assert back.axes is None
    assert_same_bits(back, single)
    np.testing.assert_array_equal(call(back, x), call(single, x))


def test_a_layer_that_leaves_its_mesh_goes_to_the_first_device_of_it(rng):
    devices = jax.devices()[4:6]
    mesh = jax.make_mesh((2, 1), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    back = move_layer(move_layer(random_layer(rng, small_config()), mesh, PARALLEL), None)
    for leaf in jax.tree.leaves(nnx.state(back)):
        assert leaf.devices() == {devices[0]}


def test_slots_are_filled_anew_where_their_number_or_order_changes():
    router = RouterConfig(scoring="sigmoid", group_limit=GroupLimit(num_groups=2, groups_kept=1))
    settings = small_config(router=router, num_redundant_experts=0)
    layer = random_layer(np.random.default_rng(0), settings)
    before = jax.tree.leaves(nnx.state(layer))
    weights = np.asarray(layer.routed_experts.down_proj[...])
    dealt = dataclasses.replace(PARALLEL, placement_strategy="round_robin", strategy="padded_all_to_all")

    four = move_layer(layer, make_mesh(1, 4, 1), dealt)
    assert all(one is other for one, other in zip(jax.tree.leaves(nnx.state(layer)), before, strict=True))
    np.testing.assert_array_equal(four.routed_experts.down_proj[...], weights[[0, 4, 1, 5, 2, 6, 3, 7]])
    two = move_layer(four, make_mesh(1, 2, 1))
    np.testing.assert_array_equal(two.routed_experts.down_proj[...], weights[[0, 2, 4, 6, 1, 3, 5, 7]])
    more = move_layer(two, make_mesh(1, 5, 1), PARALLEL, num_redundant_experts=2)
    np.testing.assert_array_equal(more.routed_experts.down_proj[...], weights[[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]])
    assert more.replicas.replica_count[...].tolist() == [2, 2, 1, 1, 1, 1, 1, 1]
    back = move_layer(more, None, num_redundant_experts=0)
    np.testing.assert_array_equal(back.routed_experts.down_proj[...], weights)
    assert back.replicas is None


def test_a_mesh_that_cannot_split_the_layer_is_refused(rng):
    layer = random_layer(rng, small_config())
    with pytest.raises(ValueError, match="the 3 ranks of expert_axis=.* must divide the physical experts"):
        move_layer(layer, jax.make_mesh((3, 1), ("expert", "tensor"), devices=jax.devices()[:3]), PARALLEL)
