"""The five vLLM pull requests behind this project: their behaviour, without the bugs that reviews found (spec 0)."""

import inspect
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import layer as oracle
from oracles.layers_under_test import call, parameters_of, random_layer

from moe_jax import (
    ExpertMapManager,
    MoEConfig,
    MoERunner,
    MoERunnerInterface,
    RoutedExperts,
    RouterConfig,
    SharedExperts,
    SharedExpertsConfig,
    is_moe_layer,
)
from moe_jax.placement import ParallelRanks

SIZES = dict(hidden_size=6, intermediate_size=7, num_experts=4, top_k=2, implementation="reference")
SHARED = SharedExpertsConfig(intermediate_size=5)


def tokens(rng, num_tokens=5, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=(num_tokens, 6)), dtype)


def expected_output(layer, x, **kwargs):
    def route(logits, *, num_experts):
        return oracle.softmax_router(logits, top_k=2, num_experts=num_experts)

    return oracle.layer(x, parameters_of(layer), route=route, num_experts=4, **kwargs)[0]


# 40671: make_expert_params_mapping becomes the module-level fused_moe_make_expert_params_mapping


def test_pr_40671_mapping_is_a_function_that_needs_no_model():
    from moe_jax.checkpoints import fused_moe_make_expert_params_mapping

    assert fused_moe_make_expert_params_mapping(None, "gate_proj", "down_proj", "up_proj", 2) == [
        ("experts.w13_", "experts.0.gate_proj.", 0, "w1"),
        ("experts.w2_", "experts.0.down_proj.", 0, "w2"),
        ("experts.w13_", "experts.0.up_proj.", 0, "w3"),
        ("experts.w13_", "experts.1.gate_proj.", 1, "w1"),
        ("experts.w2_", "experts.1.down_proj.", 1, "w2"),
        ("experts.w13_", "experts.1.up_proj.", 1, "w3"),
    ]


def test_pr_40671_redundant_experts_read_the_tensors_of_the_experts_they_copy():
    from moe_jax.checkpoints import fused_moe_make_expert_params_mapping

    rows = fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", 2, num_redundant_experts=1)
    assert len(rows) == 3 * (2 + 1)
    assert rows[-3:] == [
        ("experts.w13_", "experts.0.w1.", 2, "w1"),
        ("experts.w2_", "experts.0.w2.", 2, "w2"),
        ("experts.w13_", "experts.0.w3.", 2, "w3"),
    ]


def test_pr_40671_fused_checkpoints_use_the_same_function():
    from moe_jax.checkpoints import fused_moe_make_expert_params_mapping

    rows = fused_moe_make_expert_params_mapping(None, "gate_up_proj", "down_proj", "gate_up_proj", num_experts=1)
    assert [row[1] for row in rows] == ["experts.0.gate_up_proj.", "experts.0.down_proj.", "experts.0.gate_up_proj."]


# prep for 38590: RoutedExperts is a class of its own, and never stores shared experts


def test_routed_experts_alias_38590_is_exported_beside_shared_experts_and_owns_only_expert_weights(rng):
    layer = random_layer(rng, MoEConfig(**SIZES, shared_experts=SHARED, expert_bias=True))
    assert isinstance(layer.routed_experts, RoutedExperts)
    assert isinstance(layer.shared_experts, SharedExperts)
    assert set(nnx.to_pure_dict(nnx.state(layer.routed_experts))) == {
        "gate_up_proj",
        "down_proj",
        "gate_up_bias",
        "down_bias",
    }
    assert "shared" not in repr(layer.routed_experts)


def test_routed_experts_alias_38590_shared_experts_are_passed_by_the_runner_at_each_call(rng):
    layer = random_layer(rng, MoEConfig(**SIZES, shared_experts=SHARED))
    x = tokens(rng)
    np.testing.assert_allclose(call(layer, x), expected_output(layer, x), rtol=1e-4, atol=1e-4)
    layer.shared_experts = random_layer(rng, MoEConfig(**SIZES, shared_experts=SHARED)).shared_experts
    np.testing.assert_allclose(call(layer, x), expected_output(layer, x), rtol=1e-4, atol=1e-4)


# 40560: one MoERunner behind MoERunnerInterface


def test_pr_40560_runner_implements_the_interface_and_the_factory_is_gone(rng):
    import moe_jax.runner

    layer = random_layer(rng, MoEConfig(**SIZES))
    assert isinstance(layer, MoERunnerInterface)
    assert inspect.isabstract(MoERunnerInterface)
    assert {"__call__", "is_internal_router"} <= MoERunnerInterface.__abstractmethods__
    assert not hasattr(moe_jax.runner, "create_moe_runner")


def test_pr_40560_router_without_a_gate_is_external_and_needs_logits(rng):
    layer = random_layer(rng, MoEConfig(**SIZES))
    assert layer.is_internal_router
    x, logits = tokens(rng), jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    with_gate = call(layer, x, router_logits=logits)
    layer.router.weight = None
    assert not layer.is_internal_router
    np.testing.assert_allclose(call(layer, x, router_logits=logits), with_gate, rtol=1e-6)
    with pytest.raises(ValueError, match="router_logits"):
        layer(x)


def test_pr_40560_replaced_part_leaves_no_stale_plan(rng):
    layer = random_layer(rng, MoEConfig(**SIZES, shared_experts=SHARED, **_scaled_output(2.0, trick=True)))
    assert layer.scaling_plan.output_factors(jnp.float16) == (1.0, 0.5)
    layer.shared_experts = None
    assert layer.scaling_plan.output_factors(jnp.float16) == (2.0, 1.0)
    x = tokens(rng, dtype=jnp.float16)
    np.testing.assert_allclose(call(layer, x), expected_output(layer, x, output_factor=2.0), rtol=2e-2, atol=2e-2)


def _scaled_output(factor, *, trick):
    router = RouterConfig(routed_scaling_factor=factor, apply_scale_to_output=True)
    return dict(router=router, inverse_scale_shared_in_float16=trick)


@pytest.mark.parametrize("shared", [None, SHARED], ids=["alone", "with shared"])
def test_pr_40560_float16_scales_the_routed_output_without_shared_experts_too(shared, rng):
    layer = random_layer(rng, MoEConfig(**SIZES, shared_experts=shared, **_scaled_output(4.0, trick=True)))
    x = tokens(rng, dtype=jnp.float16)
    factors = dict(output_factor=4.0) if shared is None else dict(output_factor=1.0, shared_factor=0.25)
    np.testing.assert_allclose(call(layer, x), expected_output(layer, x, **factors), rtol=2e-2, atol=2e-2)


# 35782: no separate layer class for shared experts; is_moe_layer


@pytest.mark.parametrize("shared", [None, SHARED], ids=["alone", "with shared"])
def test_pr_35782_one_layer_class_with_and_without_shared_experts(shared, rng):
    layer = random_layer(rng, MoEConfig(**SIZES, shared_experts=shared))
    x = tokens(rng)
    assert type(layer) is MoERunner
    np.testing.assert_allclose(call(layer, x), expected_output(layer, x), rtol=1e-4, atol=1e-4)


def test_pr_35782_zero_tokens_are_legal(rng):
    layer = random_layer(rng, MoEConfig(**SIZES, shared_experts=SHARED))
    y, aux = call(layer, tokens(rng, 0), with_aux=True)
    assert y.shape == (0, 6)
    assert aux.expert_load.tolist() == [0, 0, 0, 0]


def test_pr_35782_is_moe_layer_judges_by_inherited_class_names(rng):
    class Custom(MoERunner):
        pass

    class Foreign:
        pass

    named_alike = type("MoERunner", (), {})
    assert is_moe_layer(random_layer(rng, MoEConfig(**SIZES)))
    assert is_moe_layer(Custom)
    assert is_moe_layer(named_alike())
    assert not is_moe_layer(Foreign())
    assert not is_moe_layer(nnx.Linear)


def test_pr_35782_is_moe_layer_imports_no_layer():
    # Runs the file by its path: importing the package around it would import the layer.
    import moe_jax.runner.discovery as discovery

    program = (
        "import runpy, sys; "
        f"names = runpy.run_path({discovery.__file__!r}); "
        "assert names['is_moe_layer'](type('MoERunner', (), {})()); "
        "assert not {'moe_jax', 'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# 41046: ExpertMapManager


def managers(num_ranks, **kwargs):
    return [
        ExpertMapManager(
            global_num_experts=4, ranks=ParallelRanks(ep_size=num_ranks, ep_rank=rank, use_ep=num_ranks > 1), **kwargs
        )
        for rank in range(num_ranks)
    ]


def experts_of_rank(whole: RoutedExperts, manager: ExpertMapManager) -> RoutedExperts:
    config = MoEConfig(**SIZES)
    local = nnx.eval_shape(lambda: RoutedExperts(config, expert_map_manager=manager, rngs=nnx.Rngs(0)))
    for name in ("gate_up_proj", "down_proj"):
        getattr(local, name).set_value(getattr(whole, name)[...][np.array(manager.get_local_expert_ids())])
    return local


@pytest.mark.parametrize(
    "strategy", [{}, dict(placement_strategy="round_robin", num_expert_group=2)], ids=["linear", "round_robin"]
)
def test_pr_41046_ranks_hold_the_experts_of_their_manager_and_add_up_to_the_layer(strategy, rng):
    layer = random_layer(rng, MoEConfig(**SIZES))
    x = tokens(rng)
    weights = jnp.asarray(rng.random((5, 2)), jnp.float32)
    ids = jnp.array([[0, 1], [3, 2], [-1, 1], [2, 0], [3, 3]])
    total = sum(
        np.asarray(experts_of_rank(layer.routed_experts, manager)(x, weights, ids))
        for manager in managers(3, **strategy)
    )
    expected = oracle.experts.fused_moe(
        x,
        weights,
        np.asarray(ids),
        layer.routed_experts.gate_up_proj[...],
        layer.routed_experts.down_proj[...],
        activate=lambda gate, up: oracle.experts.activate("silu", gate, up),
    )
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)


def test_pr_41046_updated_manager_moves_every_table_and_the_experts_follow(rng):
    layer = random_layer(rng, MoEConfig(**SIZES))
    one_rank = managers(1)[0]
    second_of_two = one_rank.update(ranks=ParallelRanks(ep_size=2, ep_rank=1, use_ep=True))
    assert one_rank.expert_map is None  # the old manager is untouched
    assert second_of_two.expert_map.tolist() == [-1, -1, 0, 1]
    local = experts_of_rank(layer.routed_experts, second_of_two)
    assert local.num_local_experts == 2
    x, ids = tokens(rng), jnp.full((5, 1), 2)
    whole = layer.routed_experts(x, jnp.ones((5, 1)), ids)
    np.testing.assert_allclose(local(x, jnp.ones((5, 1)), ids), whole, rtol=1e-5, atol=1e-6)


def test_pr_41046_fused_shared_experts_are_counted_after_an_update():
    manager = managers(2, num_fused_shared_experts=1)[0]
    assert manager.local_num_experts == 3
    assert manager.update(ranks=ParallelRanks(ep_size=4, ep_rank=0, use_ep=True)).local_num_experts == 2
