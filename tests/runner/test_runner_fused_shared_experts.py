"""Shared experts as further experts of the grouped computation: the layer's output stays what the float64 oracle says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import layer as oracle
from oracles.layers_under_test import call, parameters_of, random_layer

from moe_jax import GroupLimit, MoEConfig, MoERunner, RouterConfig, SharedExperts, SharedExpertsConfig
from moe_jax.experts import ExpertWeights

SHARED = SharedExpertsConfig(intermediate_size=3 * 20)


def config(**changes):
    base = dict(
        hidden_size=12,
        intermediate_size=20,
        num_experts=5,
        top_k=2,
        shared_experts=SHARED,
        fuse_shared_experts=True,
        implementation="reference",
    )
    return MoEConfig(**(base | changes))


def tokens(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(actual, expected, tolerance=2e-5):
    atol = tolerance * max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


def separate(layer):
    """The same layer whose shared experts run on their own."""
    settings = dataclasses.replace(layer.config, fuse_shared_experts=False)
    return random_layer(None, settings, values=nnx.state(layer))


BIASES = dict(expert_bias=True, shared_experts=dataclasses.replace(SHARED, bias=True))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(), id="plain"),
        pytest.param(dict(activation="relu2_no_mul", **BIASES), id="biases, no gate"),
        pytest.param(BIASES, id="biases", marks=pytest.mark.slow),
    ],
)
def test_layer_with_fused_shared_experts_equals_oracle(changes, rng):
    settings = config(**changes)
    layer = random_layer(rng, settings)
    x = tokens(rng, 7, 12)
    route = functools.partial(oracle.softmax_router, top_k=2)
    expected, ids = oracle.layer(x, parameters_of(layer), route=route, num_experts=5, activation=settings.activation)
    y, aux = call(layer, x, with_aux=True)
    assert_close(y, expected)
    np.testing.assert_array_equal(np.sort(aux.topk_ids), np.sort(ids))  # those of routed experts only
    np.testing.assert_array_equal(aux.expert_load, np.bincount(ids.ravel(), minlength=5))
    assert aux.physical_load.tolist() == aux.expert_load.tolist()


@pytest.mark.parametrize("to_output", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_routed_scaling_factor_leaves_fused_shared_experts_alone(to_output, rng):
    router = RouterConfig(
        scoring="sigmoid",
        correction_bias=True,
        group_limit=GroupLimit(num_groups=4, groups_kept=2),
        routed_scaling_factor=2.5,
        apply_scale_to_output=to_output,
    )
    layer = random_layer(rng, config(num_experts=12, top_k=3, router=router))
    x = tokens(rng, 9, 12)
    parameters = parameters_of(layer)
    bias = parameters["router"]["correction_bias"]
    route = functools.partial(
        oracle.grouped_sigmoid_router,
        top_k=3,
        num_groups=4,
        groups_kept=2,
        correction_bias=bias,
        factor=1.0 if to_output else 2.5,
    )
    factor = 2.5 if to_output else 1.0
    expected, _ = oracle.layer(x, parameters, route=route, num_experts=12, output_factor=factor)
    assert_close(call(layer, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_redundant_experts=3, router=RouterConfig(num_zero_experts=2, correction_bias=True, renormalize=False)),
        dict(implementation=None, dtype=jnp.bfloat16),
    ],
    ids=["redundant and zero experts", "bfloat16"],
)
def test_fused_and_separate_shared_experts_are_one_function_of_the_same_parameters(changes, rng):
    layer = random_layer(rng, config(**changes))
    alone = separate(layer)
    x = tokens(rng, 6, 12)
    mask = jnp.asarray([1, 1, 0, 1, 0, 1])
    direction = tokens(rng, 6, 12)

    @nnx.jit
    def gradients(layer):
        def loss(layer):
            y, aux = layer(x, token_mask=mask, with_aux=True)
            return (y * direction).sum(), (y, aux)

        # The loss itself follows from y; as a sum that may cancel it has no bound of its own.
        (_, results), gradients = nnx.value_and_grad(loss, has_aux=True)(layer)
        return results, gradients

    expected, actual = gradients(alone), gradients(layer)
    tolerance = 1e-5 if layer.config.dtype is None else 3e-2
    flat, _ = jax.tree.flatten_with_path(expected)
    for (path, one), other in zip(flat, jax.tree.leaves(actual), strict=True):
        scale = max(1.0, np.abs(np.asarray(one, np.float64)).max(initial=0))
        np.testing.assert_allclose(
            np.asarray(other, np.float64),
            np.asarray(one, np.float64),
            rtol=0,
            atol=tolerance * scale,
            err_msg=jax.tree_util.keystr(path),
        )


def test_no_tokens_are_legal(rng):
    layer = random_layer(rng, config())
    assert call(layer, tokens(rng, 0, 12)).shape == (0, 12)


def test_a_wide_expert_becomes_narrow_ones_in_the_order_of_its_features(rng):
    shapes = (1, 2, 6, 4), (1, 4, 6), (1, 2, 6), (1, 4)
    wide = ExpertWeights(*(np.float32(rng.normal(size=shape)) for shape in shapes))
    experts = ExpertWeights(*(np.zeros(shape, np.float32) for shape in ((5, 2, 3, 4), (5, 4, 3), (5, 2, 3), (5, 4))))
    together = jax.tree.map(np.asarray, jax.jit(ExpertWeights.followed_by)(experts, wide))
    assert not any(array[:5].any() for array in jax.tree.leaves(together))
    for expert, features in enumerate((slice(0, 3), slice(3, 6)), start=5):
        np.testing.assert_array_equal(together.gate_up_proj[expert], wide.gate_up_proj[0, :, features])
        np.testing.assert_array_equal(together.down_proj[expert], wide.down_proj[0, :, features])
        np.testing.assert_array_equal(together.gate_up_bias[expert], wide.gate_up_bias[0, :, features])
    np.testing.assert_array_equal(together.down_bias[5:].sum(axis=0), wide.down_bias[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shared_experts=None), "shared_experts, got None"),
        (dict(intermediate_size=16), "a multiple of intermediate_size=16 as intermediate_size .*, got 60"),
        (dict(shared_experts=dataclasses.replace(SHARED, hidden_size=8)), "hidden_size=12 .*, got 8"),
        (dict(shared_experts=dataclasses.replace(SHARED, sigmoid_gate=True)), ".* without a sigmoid_gate, got .*=True"),
        (dict(expert_bias=True), "shared_experts.bias=True like expert_bias, got False"),
        (dict(apply_router_weight_on_input=True, top_k=1), "apply_router_weight_on_input=False, got True"),
        (
            dict(inverse_scale_shared_in_float16=True, router=RouterConfig(apply_scale_to_output=True)),
            "inverse_scale_shared_in_float16=False, got True",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else ", ".join(value),
)
def test_shared_experts_that_are_unlike_the_routed_ones_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"fuse_shared_experts=True needs {message}"):
        config(**changes)


def built(**parts):
    return nnx.eval_shape(lambda: MoERunner(config(), rngs=nnx.Rngs(0), **parts))


@pytest.mark.parametrize("name", ["routed_input_transform", "routed_output_transform"])
def test_transforms_of_routed_experts_are_refused_also_later(name):
    transform = nnx.eval_shape(lambda: nnx.Linear(12, 12, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"needs {name}=None, .* got Linear"):
        built(**{name: transform})
    layer = built()
    setattr(layer, name, transform)
    with pytest.raises(ValueError, match=f"needs {name}=None, .* got Linear"):
        nnx.eval_shape(lambda layer: layer(jnp.zeros((2, 12))), layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config(shared_experts=SharedExpertsConfig(intermediate_size=40)), r"down_proj of the shape \(60, 12\)"),
        (config(activation="gelu_tanh"), "the activation of the routed experts"),
        (config(expert_bias=True, shared_experts=dataclasses.replace(SHARED, bias=True)), "biases as the routed"),
        (
            config(fuse_shared_experts=False, shared_experts=dataclasses.replace(SHARED, sigmoid_gate=True)),
            "no sigmoid gate",
        ),
    ],
)
def test_a_module_of_other_shared_experts_is_refused(settings, message):
    shared = nnx.eval_shape(lambda: SharedExperts(settings, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"needs shared_experts with {message}"):
        built(shared_experts=shared)


def test_a_module_that_is_no_shared_experts_is_refused():
    shared = nnx.eval_shape(lambda: nnx.Linear(12, 12, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="needs a SharedExperts, .* got Linear"):
        built(shared_experts=shared)


def test_an_input_for_shared_experts_alone_is_refused():
    x = jnp.zeros((2, 12))
    with pytest.raises(ValueError, match="shared_experts_input needs fuse_shared_experts=False"):
        nnx.eval_shape(lambda layer: layer(x, shared_experts_input=x), built())
