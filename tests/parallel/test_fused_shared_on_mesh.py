"""Shared experts fused with the routed ones, on a mesh: every strategy gives what the layer with separate ones gives on one device,
forward and backward, and moves no row for them."""

import dataclasses
import functools
import operator
import os
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from oracles import layer as oracle
from oracles.dispatch import count_sent_rows
from oracles.layers_under_test import call, parameters_of, random_layer
from support.sharded_layers import assert_equal_results, make_mesh, sharded_like, small_config, value_and_gradients

from moe_jax import GroupLimit, MoERunner, ParallelConfig, RouterConfig, SharedExpertsConfig
from moe_jax.runner.elastic import move_layer

ALL_TO_ALL = ("padded_all_to_all", "ragged_all_to_all")
SAME_TOKENS = dict(expert_axis="expert", tensor_axis="tensor", data_axis="data")
OTHER_TOKENS = dict(expert_axis="expert", tensor_axis="tensor", data_axis="data", sequence_axis="expert")
MIXED = dict(expert_axis=("data", "expert"), tensor_axis="tensor", data_axis="data")
EXCHANGED_TENSORS = dict(expert_axis="expert", tensor_axis=("tensor", "data"), data_axis="data")
SCALED = RouterConfig(routed_scaling_factor=2.5, apply_scale_to_output=True)


def config(**changes):
    """Two shared experts among eight routed ones; every bias counts."""
    shared = SharedExpertsConfig(intermediate_size=2 * 8, bias=True)
    return small_config(shared_experts=shared, **changes)


@functools.cache
def problem():
    """A layer on one device whose shared experts run on their own, tokens, and a direction for gradients."""
    seed = int(os.environ.get("MOE_JAX_TEST_SEED") or secrets.randbits(32))
    print(f"layer drawn from seed {seed}")
    rng = np.random.default_rng(seed)
    single = random_layer(rng, config(num_experts=12, num_redundant_experts=4, top_k=3, router=SCALED))
    x, direction = (jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32) for _ in range(2))
    return single, x, direction


@functools.cache
def answer():
    """What the layer answers to its tokens, and its gradients: compiled once for all cases."""
    return value_and_gradients(*problem())


def fused(single, mesh, parallel):
    """The layer `single` with the same parameters, its shared experts fused, on a mesh."""
    settings = dataclasses.replace(single.config, fuse_shared_experts=True, parallel=parallel)
    return random_layer(None, settings, values=nnx.state(single), mesh=mesh)


# Strategy, axes, sizes of data, expert and tensor axis, options.
CASES = [
    ("replicated", SAME_TOKENS, (1, 4, 2), dict()),
    ("padded_all_to_all", EXCHANGED_TENSORS, (2, 2, 2), dict(one_row_per_rank=True)),
    ("ragged_all_to_all", SAME_TOKENS, (1, 4, 2), dict(micro_batches=2)),
]
GRADIENT_CASES = [
    ("allgather_reducescatter", MIXED, (2, 2, 2), dict()),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("replicated", SAME_TOKENS, (2, 2, 2), dict()),
            ("allgather_reducescatter", EXCHANGED_TENSORS, (2, 2, 2), dict(micro_batches=2)),
            ("ragged_all_to_all", OTHER_TOKENS, (1, 8, 1), dict(one_row_per_rank=True)),
            *CASES[1:],
        ]
    ),
]


@pytest.mark.parametrize(("strategy", "axes", "sizes", "options"), CASES, ids=str)
def test_fused_layer_on_a_mesh_equals_the_separate_one_on_one_device(strategy, axes, sizes, options):
    single, x, _ = problem()
    sharded = fused(single, make_mesh(*sizes), ParallelConfig(strategy=strategy, **axes, **options))
    y, aux = call(sharded, x, with_aux=True)
    expected = answer()[0]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    assert_only_routed_experts_are_counted(sharded, aux)


@pytest.mark.parametrize(("strategy", "axes", "sizes", "options"), GRADIENT_CASES, ids=str)
def test_gradients_of_the_ranks_copies_are_summed(strategy, axes, sizes, options):
    single, x, direction = problem()
    sharded = fused(single, make_mesh(*sizes), ParallelConfig(strategy=strategy, **axes, **options))
    aux = assert_equal_results(answer(), value_and_gradients(sharded, x, direction))
    assert_only_routed_experts_are_counted(sharded, aux)


def assert_only_routed_experts_are_counted(layer, aux):
    assert aux.topk_ids.shape[-1] == layer.config.top_k
    physical = np.asarray(layer.replicas(aux.topk_ids[0]))
    assert aux.physical_load.tolist() == np.bincount(physical.ravel(), minlength=16).tolist()
    assert aux.sent_rows.tolist() == count_sent_rows(physical, layer.axes, layer.config)


@pytest.mark.slow
def test_tokens_that_are_missing_or_all_on_one_expert_pass_their_shared_experts(rng):
    single = random_layer(rng, config())
    sharded = fused(single, make_mesh(1, 4, 1), ParallelConfig(strategy="ragged_all_to_all", **OTHER_TOKENS))
    for num_tokens in (0, 5):
        x = jnp.asarray(rng.normal(size=(num_tokens, 6)), jnp.float32)
        ids = jnp.full((num_tokens, 2), 6, jnp.int32)
        y, aux = call(sharded, x, forced_ids=ids, with_aux=True)
        np.testing.assert_allclose(y, call(single, x, forced_ids=ids), rtol=1e-5, atol=1e-5)
        assert aux.expert_load.tolist() == [0, 0, 0, 0, 0, 0, 2 * num_tokens, 0]


def test_a_full_rank_drops_routed_rows_and_no_shared_expert(rng):
    single = random_layer(rng, config())
    for name in ("down_proj", "down_bias"):
        getattr(single.routed_experts, name)[...] *= 0
    parallel = ParallelConfig(strategy="padded_all_to_all", capacity_factor=0.01, **OTHER_TOKENS)
    sharded = fused(single, make_mesh(1, 4, 1), parallel)
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    y, aux = call(sharded, x, forced_ids=jnp.tile(jnp.array([[6, 7]]), (16, 1)), with_aux=True)
    assert aux.dropped_rows > 0
    activate = functools.partial(oracle.experts.activate, "silu")
    expected = oracle.shared_experts(np.float64(x), parameters_of(single)["shared_experts"], activate=activate)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["replicated", pytest.param("ragged_all_to_all", marks=pytest.mark.slow)])
def test_a_token_passes_each_shared_expert_once(strategy, rng):
    single = random_layer(rng, config())
    sharded = fused(single, make_mesh(1, 4, 2), ParallelConfig(strategy=strategy, **SAME_TOKENS))
    nnx.update(sharded, jax.tree.map(jnp.zeros_like, nnx.state(sharded)))
    sharded.shared_experts.down_proj.bias[...] += 10.0
    np.testing.assert_array_equal(call(sharded, jnp.ones((7, 6))), np.full((7, 6), 10.0))


def test_every_expert_rank_holds_the_fused_shared_experts():
    parallel = ParallelConfig(strategy="replicated", **SAME_TOKENS)
    settings = config(fuse_shared_experts=True, num_redundant_experts=4, num_experts=12, parallel=parallel)
    mesh = make_mesh(1, 4, 2)
    layer = nnx.eval_shape(lambda: MoERunner(settings, rngs=nnx.Rngs(0), mesh=mesh))
    assert [layer.expert_map_manager(rank).local_num_experts for rank in range(4)] == [4 + 2] * 4
    specs = layer.partition_specs()
    held = {
        ("routed_experts", "down_proj"): (4, 6, 4),
        ("shared_experts", "up_proj", "kernel"): (6, 8),
        ("shared_experts", "down_proj", "kernel"): (8, 6),
        ("shared_experts", "down_proj", "bias"): (6,),
    }
    for path, shape in held.items():
        spec, parameter = (functools.reduce(operator.getitem, path, tree) for tree in (specs, nnx.state(layer)))
        assert NamedSharding(mesh, spec).shard_shape(parameter.shape) == shape
    assert "none to the 2 fused shared experts, which every rank has" in layer.explain_dispatch(64).formulation


def test_shared_experts_need_not_divide_among_ranks_that_hold_the_same_tokens():
    parallel = ParallelConfig(strategy="replicated", **SAME_TOKENS)
    shared = SharedExpertsConfig(intermediate_size=3)
    settings = dict(intermediate_size=3, expert_bias=False, shared_experts=shared, parallel=parallel)
    mesh = make_mesh(1, 8, 1)
    nnx.eval_shape(lambda: MoERunner(small_config(fuse_shared_experts=True, **settings), rngs=nnx.Rngs(0), mesh=mesh))
    with pytest.raises(ValueError, match="must divide the intermediate_size of the shared experts, got 3"):
        nnx.eval_shape(lambda: MoERunner(small_config(**settings), rngs=nnx.Rngs(0), mesh=mesh))


def dealt_in_turns(strategy):
    router = RouterConfig(scoring="sigmoid", group_limit=GroupLimit(num_groups=2, groups_kept=1))
    parallel = ParallelConfig(strategy=strategy, placement_strategy="round_robin", **OTHER_TOKENS)
    return dict(router=router, parallel=parallel)


@pytest.mark.parametrize("strategy", ALL_TO_ALL)
def test_round_robin_placement_with_routing_tables_is_refused(strategy):
    settings = config(fuse_shared_experts=True, **dealt_in_turns(strategy))
    with pytest.raises(ValueError, match="`round_robin` placement .* needs num_fused_shared_experts = 0, got 2"):
        nnx.eval_shape(lambda: MoERunner(settings, rngs=nnx.Rngs(0), mesh=make_mesh(1, 4, 1)))


def test_from_n_to_m_ranks_and_back_keeps_bits(rng):
    single = random_layer(rng, config(fuse_shared_experts=True))
    parallel = ParallelConfig(strategy="allgather_reducescatter", **OTHER_TOKENS)
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    moved = move_layer(single, make_mesh(1, 4, 2), parallel)
    fresh = sharded_like(single, make_mesh(1, 4, 2), parallel)
    np.testing.assert_array_equal(call(moved, x), call(fresh, x))
    kernel = moved.shared_experts.down_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 6)
    back = move_layer(moved, None)
    for one, other in zip(*(jax.tree.leaves(nnx.state(layer)) for layer in (single, back)), strict=True):
        np.testing.assert_array_equal(one, other)
