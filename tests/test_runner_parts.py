"""Parts of a layer: replaced after construction, and refused where they do not belong to its config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.layers_under_test import call, random_layer

from moe_jax import MoEConfig, MoERunner, ParallelConfig, RoutedExperts, RouterConfig
from moe_jax.routing import Router


def config(**changes) -> MoEConfig:
    base = dict(hidden_size=6, intermediate_size=8, num_experts=8, top_k=2, implementation="reference")
    return MoEConfig(**(base | changes))


def test_a_transform_may_become_a_function_then_a_module_then_nothing(rng):
    layer = random_layer(rng, config())
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    plain = call(layer, x)
    expected = call(layer, jnp.tanh(x))
    layer.routed_input_transform = jnp.tanh
    np.testing.assert_allclose(call(layer, x), expected, rtol=1e-5, atol=1e-6)
    linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    layer.routed_input_transform = linear
    np.testing.assert_array_equal(nnx.to_pure_dict(nnx.state(layer))["routed_input_transform"]["kernel"], linear.kernel)
    transformed = call(layer, x)
    layer.routed_input_transform = None
    np.testing.assert_array_equal(call(layer, x), plain)
    np.testing.assert_allclose(transformed, call(layer, linear(x)), rtol=1e-5, atol=1e-6)


SCALING = RouterConfig(routed_scaling_factor=2.5)
SCALED_LATER = dataclasses.replace(SCALING, apply_scale_to_output=True)


@pytest.mark.parametrize(
    ("of_layer", "of_part", "message"),
    [
        (dict(router=SCALED_LATER), dict(router=SCALING), "its router is .*apply_scale_to_output=False"),
        (dict(router=SCALING), dict(router=SCALED_LATER), "its router is .*apply_scale_to_output=True"),
        (dict(), dict(num_experts=4), "its num_experts is 4, that of the config 8"),
        (dict(), dict(top_k=1), "its top_k is 1, that of the config 2"),
    ],
)
def test_a_router_built_for_another_config_is_refused(of_layer, of_part, message):
    def build():
        router = Router(config(**of_part), rngs=nnx.Rngs(0))
        return MoERunner(config(**of_layer), router=router, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=f"router must be built for the layer's config: {message}"):
        nnx.eval_shape(build)


@pytest.mark.parametrize(
    ("of_part", "message"),
    [
        (dict(num_experts=4), "its number of physical experts is 4, that of the config 8"),
        (dict(num_redundant_experts=8), "its number of physical experts is 16, that of the config 8"),
        (dict(activation="gelu"), "its computation is .*gelu"),
    ],
)
def test_experts_built_for_another_config_are_refused(of_part, message):
    def build():
        experts = RoutedExperts(config(**of_part), rngs=nnx.Rngs(0))
        return MoERunner(config(), routed_experts=experts, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=f"routed_experts must be built for the layer's config: {message}"):
        nnx.eval_shape(build)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("wrong", ["one id", "all ids"])
def test_an_id_that_no_expert_has_spoils_its_token_and_no_other(top_k, wrong, rng):
    layer = random_layer(rng, config(top_k=top_k))
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    ids = np.broadcast_to(np.arange(top_k), (3, top_k)).copy()
    expected = call(layer, x, forced_ids=jnp.asarray(ids, jnp.int32))
    ids[1, : 1 if wrong == "one id" else top_k] = 8
    result = call(layer, x, forced_ids=jnp.asarray(ids, jnp.int32))
    assert np.isnan(result[1]).all()
    np.testing.assert_allclose(result[::2], expected[::2], rtol=1e-5, atol=1e-6)


def test_a_custom_function_that_names_no_expert_spoils_the_token(rng):
    def beyond(hidden_states, router_logits, top_k, renormalize):
        shape = (hidden_states.shape[0], top_k)
        return jnp.ones(shape), jnp.full(shape, 9, jnp.int32)

    layer = random_layer(rng, config(router=RouterConfig(custom=beyond)))
    assert np.isnan(call(layer, jnp.ones((2, 6)))).all()


@pytest.mark.parametrize(
    "given",
    [dict(strategy="padded_all_to_all"), dict(capacity_factor=2.0), dict(one_row_per_rank=True), dict(micro_batches=2)],
)
def test_ways_of_dispatch_need_a_mesh(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"needs mesh=, got None with {name}="):
        nnx.eval_shape(lambda: MoERunner(config(parallel=ParallelConfig(**given)), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("activation", ["silu", "silu_no_mul"])
def test_matrices_of_every_kind_start_with_the_variance_of_their_inputs(activation):
    sizes = dict(hidden_size=96, intermediate_size=64, num_experts=12, activation=activation)
    experts = RoutedExperts(config(**sizes), rngs=nnx.Rngs(jax.random.key(0)))
    assert np.std(experts.gate_up_proj[...]) * 96**0.5 == pytest.approx(1, abs=0.02)
    assert np.std(experts.down_proj[...]) * 64**0.5 == pytest.approx(1, abs=0.02)
