"""The whole layer against a float64 oracle: routing, experts, shared experts, transforms, scaling."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import layer as oracle
from oracles.layers_under_test import call, parameters_of, random_layer

from moe_jax import GroupLimit, MoEConfig, MoERunner, ParallelConfig, RouterConfig, SharedExpertsConfig

# Of the whole layer, relative to the largest output: sums of a few dozen float32 products.
FLOAT32_TOLERANCE = 2e-5


def config(**changes):
    base = dict(hidden_size=12, intermediate_size=20, num_experts=5, top_k=2, implementation="reference")
    return MoEConfig(**(base | changes))


def tokens(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(actual, expected, tolerance=FLOAT32_TOLERANCE):
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)))


def softmax_router(top_k, **kwargs):
    return functools.partial(oracle.softmax_router, top_k=top_k, **kwargs)


SHARED = {
    "none": None,
    "plain": SharedExpertsConfig(intermediate_size=9),
    "biases": SharedExpertsConfig(intermediate_size=9, bias=True),
    "sigmoid gate": SharedExpertsConfig(intermediate_size=9, sigmoid_gate=True, bias=True),
}


@pytest.mark.parametrize(
    ("activation", "shared"),
    [
        *itertools.product(["silu"], SHARED),
        ("gelu_tanh", "sigmoid gate"),
        ("relu2_no_mul", "biases"),
        *(pytest.param("relu2_no_mul", shared, marks=pytest.mark.slow) for shared in ("none", "sigmoid gate")),
    ],
)
def test_layer_equals_oracle(activation, shared, rng):
    layer = random_layer(
        rng, config(activation=activation, shared_experts=SHARED[shared], expert_bias=shared != "none")
    )
    x = tokens(rng, 7, 12)
    expected, _ = oracle.layer(x, parameters_of(layer), route=softmax_router(2), num_experts=5, activation=activation)
    assert_close(call(layer, x), expected)


# Upstream's grid of layers (spec 10.7), reduced in size: tokens, intermediate, hidden; its tolerance is 3.5e-2.
UPSTREAM_GRID = list(itertools.product([(1, 32, 64), (33, 64, 48)], [(8, 2), (64, 6)], [jnp.float32, jnp.bfloat16]))
SAMPLE = ((1, (64, 6), jnp.float32), (1, (8, 2), jnp.bfloat16), (33, (8, 2), jnp.float32), (33, (64, 6), jnp.bfloat16))


@pytest.mark.parametrize(
    ("sizes", "experts", "dtype"),
    [
        pytest.param(*case, marks=() if (case[0][0], *case[1:]) in SAMPLE else pytest.mark.slow, id=str(case))
        for case in UPSTREAM_GRID
    ],
)
def test_layer_with_chosen_implementation_equals_oracle(sizes, experts, dtype, rng):
    (num_tokens, intermediate, hidden), (num_experts, top_k) = sizes, experts
    tolerance = FLOAT32_TOLERANCE if dtype == jnp.float32 else 3.5e-2
    settings = config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=num_experts,
        top_k=top_k,
        shared_experts=SharedExpertsConfig(intermediate_size=intermediate),
        param_dtype=dtype,
        implementation=None,
    )
    layer = random_layer(rng, settings, scale=hidden**-0.5)
    x = tokens(rng, num_tokens, hidden, dtype=dtype)
    y, aux = call(layer, x, with_aux=True)
    # Near-ties may choose another expert in a rounder dtype, so the oracle goes where the layer went.
    expected, _ = oracle.layer(
        x, parameters_of(layer), route=functools.partial(_replay, ids=np.asarray(aux.topk_ids)), num_experts=num_experts
    )
    assert y.dtype == dtype
    assert_close(y, expected, tolerance)


def _replay(logits, *, num_experts, ids):
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = np.take_along_axis(scores / scores.sum(axis=-1, keepdims=True), ids, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True), ids


@pytest.mark.parametrize("to_output", [False, True])
def test_grouped_sigmoid_layer_with_scaling_equals_oracle(to_output, rng):
    router = RouterConfig(
        scoring="sigmoid",
        correction_bias=True,
        group_limit=GroupLimit(num_groups=4, groups_kept=2),
        routed_scaling_factor=2.5,
        apply_scale_to_output=to_output,
    )
    layer = random_layer(rng, config(num_experts=12, top_k=3, router=router, shared_experts=SHARED["plain"]))
    x = tokens(rng, 9, 12)
    parameters = parameters_of(layer)
    route = functools.partial(
        oracle.grouped_sigmoid_router,
        top_k=3,
        num_groups=4,
        groups_kept=2,
        correction_bias=parameters["router"]["correction_bias"],
        factor=1.0 if to_output else 2.5,
    )
    expected, ids = oracle.layer(x, parameters, route=route, num_experts=12, output_factor=2.5 if to_output else 1.0)
    y, aux = call(layer, x, with_aux=True)
    assert_close(y, expected)
    np.testing.assert_array_equal(np.sort(aux.topk_ids), np.sort(ids))


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 5), (7, 1)])
def test_zero_tokens_one_token_and_all_experts_at_once(num_tokens, num_experts, top_k, rng):
    layer = random_layer(rng, config(num_experts=num_experts, top_k=top_k, shared_experts=SHARED["sigmoid gate"]))
    x = tokens(rng, num_tokens, 12)
    expected, ids = oracle.layer(x, parameters_of(layer), route=softmax_router(top_k), num_experts=num_experts)
    y, aux = call(layer, x, with_aux=True)
    assert_close(y, expected)
    np.testing.assert_array_equal(aux.expert_load, np.bincount(ids.ravel(), minlength=num_experts))
    assert aux.topk_ids.shape == (num_tokens, top_k)


def test_all_tokens_on_one_expert(rng):
    layer = random_layer(rng, config(top_k=1))
    x = tokens(rng, 17, 12)
    logits = np.zeros((17, 5))
    logits[:, 3] = 9
    expected, _ = oracle.layer(x, parameters_of(layer), route=softmax_router(1), num_experts=5, router_logits=logits)
    y, aux = call(layer, x, router_logits=jnp.asarray(logits), with_aux=True)
    assert_close(y, expected)
    assert aux.expert_load.tolist() == [0, 0, 0, 17, 0]


def test_router_weight_on_input_equals_oracle(rng):
    layer = random_layer(
        rng, config(top_k=1, apply_router_weight_on_input=True, router=RouterConfig(renormalize=False))
    )
    x = tokens(rng, 6, 12)
    expected, _ = oracle.layer(
        x,
        parameters_of(layer),
        route=softmax_router(1, renormalize=False),
        num_experts=5,
        apply_router_weight_on_input=True,
    )
    assert_close(call(layer, x), expected)


def latent_layer(rng, *, to_output=True):
    """Tokens of width 10, routed experts of width 12; transforms with biases, the output one not linear."""
    router = RouterConfig(routed_scaling_factor=1.5, apply_scale_to_output=to_output)
    shared = SharedExpertsConfig(intermediate_size=9, hidden_size=10)
    project_in = nnx.Linear(10, 12, rngs=nnx.Rngs(0))
    project_out = nnx.Sequential(nnx.Linear(12, 10, rngs=nnx.Rngs(0)), nnx.gelu)
    settings = config(router=router, shared_experts=shared)
    layer = random_layer(rng, settings, routed_input_transform=project_in, routed_output_transform=project_out)
    into, out = (
        parameters_of(layer.routed_input_transform),
        parameters_of(layer.routed_output_transform)["layers"][0],
    )
    parameters = parameters_of(layer)
    expect = functools.partial(
        oracle.layer,
        parameters=parameters,
        route=softmax_router(2, factor=1.0 if to_output else 1.5),
        num_experts=5,
        output_factor=1.5 if to_output else 1.0,
        output_transform=lambda routed: oracle.experts.activate("gelu_tanh", oracle.linear(routed, out), 1.0),
    )
    return layer, expect, lambda x: oracle.linear(x, into)


@pytest.mark.parametrize("to_output", [False, True])
def test_transforms_wrap_only_the_routed_path_and_follow_the_scaling(to_output, rng):
    layer, expect, transform = latent_layer(rng, to_output=to_output)
    x = tokens(rng, 6, 10)
    expected, _ = expect(x, input_transform=transform)
    assert_close(call(layer, x), expected, tolerance=1e-4)


def test_caller_who_gives_the_shared_input_has_transformed_the_routed_input(rng):
    layer, expect, transform = latent_layer(rng)
    x = tokens(rng, 6, 10)
    latent, other = transform(np.asarray(x, np.float64)), tokens(rng, 6, 10)
    expected, _ = expect(latent, shared_input=other)
    assert_close(call(layer, jnp.asarray(latent, jnp.float32), shared_experts_input=other), expected, tolerance=1e-4)


def test_first_element_of_a_transform_that_returns_a_tuple_is_used(rng):
    layer = random_layer(rng, config())
    x = tokens(rng, 4, 12)
    expected = call(layer, 2 * x)
    layer.routed_input_transform = nnx.data(Doubling())
    np.testing.assert_allclose(call(layer, x), expected, rtol=1e-5, atol=1e-6)


class Doubling(nnx.Module):
    def __call__(self, x):
        return 2 * x, "extra"


def test_internal_gate_sees_the_transformed_input_and_external_logits_replace_it(rng):
    layer, expect, transform = latent_layer(rng)
    x = tokens(rng, 6, 10)
    weight = parameters_of(layer)["router"]["weight"]
    _, aux = call(layer, x, with_aux=True)
    assert_close(aux.router_logits, transform(np.asarray(x, np.float64)) @ weight.T)
    logits = tokens(rng, 6, 5)
    y, aux = call(layer, x, router_logits=logits, with_aux=True)
    np.testing.assert_array_equal(aux.router_logits, logits)
    assert_close(y, expect(x, input_transform=transform, router_logits=logits)[0], tolerance=1e-4)


def test_zero_experts_return_the_token_itself_times_their_weight(rng):
    router = RouterConfig(num_zero_experts=3, renormalize=False, routed_scaling_factor=6.0, correction_bias=True)
    layer = random_layer(rng, config(num_experts=4, top_k=4, router=router, shared_experts=SHARED["plain"]))
    layer.router.correction_bias[...] = jnp.zeros(7)
    x = tokens(rng, 8, 12)
    route = softmax_router(4, renormalize=False, factor=6.0)
    expected, ids = oracle.layer(x, parameters_of(layer), route=route, num_experts=4)
    y, aux = call(layer, x, with_aux=True)
    assert (ids >= 4).any()
    assert_close(y, expected)
    np.testing.assert_array_equal(np.sort(aux.topk_ids), np.sort(ids))
    np.testing.assert_array_equal(aux.expert_load, np.bincount(ids[ids < 4], minlength=4))


def test_captured_ids_forced_again_give_the_same_output(rng):
    layer = random_layer(rng, config(num_experts=9, top_k=3))
    x = tokens(rng, 2, 5, 12)
    y, aux = call(layer, x, with_aux=True)
    assert aux.topk_ids.shape == (2, 5, 3)
    replayed, again = call(layer, x, forced_ids=aux.topk_ids, with_aux=True)
    np.testing.assert_allclose(replayed, y, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(again.topk_ids, aux.topk_ids)


def test_forced_ids_are_obeyed_and_padding_is_neither_computed_nor_counted(rng):
    layer = random_layer(rng, config())
    x = tokens(rng, 3, 12)
    ids = np.array([[4, 0], [-1, 2], [-1, -1]], np.int32)
    y, aux = call(layer, x, forced_ids=jnp.asarray(ids), with_aux=True)
    logits = np.asarray(x, np.float64) @ parameters_of(layer)["router"]["weight"].T
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    weights = np.where(ids >= 0, np.take_along_axis(scores, np.maximum(ids, 0), axis=-1), 0)
    weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    expected, _ = oracle.layer(x, parameters_of(layer), route=lambda *_, **__: (weights, ids), num_experts=5)
    assert_close(y, expected)
    np.testing.assert_array_equal(y[2], np.zeros(12))
    assert aux.expert_load.tolist() == [1, 0, 1, 0, 1]
    assert aux.dropped_rows == 0


def test_poisoned_padding_rows_leave_other_tokens_alone(rng):
    layer = random_layer(rng, config())
    x = tokens(rng, 4, 12)
    ids = jnp.array([[0, 1], [2, 3], [-1, -1], [4, 0]])
    others = np.array([0, 1, 3])
    y = call(layer, x.at[2].set(jnp.nan), forced_ids=ids)
    np.testing.assert_array_equal(y[others], call(layer, x, forced_ids=ids)[others])


@pytest.mark.parametrize("shape", [(12,), (2, 3, 12), (2, 0, 3, 12)], ids=str)
def test_any_leading_dimensions_are_kept(shape, rng):
    layer = random_layer(rng, config(shared_experts=SHARED["plain"]))
    x = tokens(rng, *shape)
    y, aux = call(layer, x, with_aux=True)
    assert y.shape == shape
    assert aux.topk_ids.shape == aux.topk_weights.shape == (*shape[:-1], 2)
    assert aux.router_logits.shape == (*shape[:-1], 5)
    expected, _ = oracle.layer(x.reshape(-1, 12), parameters_of(layer), route=softmax_router(2), num_experts=5)
    assert_close(y.reshape(-1, 12), expected)


def test_redundant_experts_with_equal_copies_leave_the_output_unchanged(rng):
    plain = random_layer(rng, config())
    redundant = random_layer(rng, config(num_redundant_experts=3))
    assert redundant.routed_experts.num_local_experts == 8
    slots = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    for name in ("gate_up_proj", "down_proj"):
        getattr(redundant.routed_experts, name)[...] = getattr(plain.routed_experts, name)[...][slots]
    redundant.router.weight[...] = plain.router.weight[...]
    x = tokens(rng, 11, 12)
    y, aux = call(redundant, x, with_aux=True)
    expected, ids = oracle.layer(x, parameters_of(plain), route=softmax_router(2), num_experts=5)
    assert_close(y, expected)
    np.testing.assert_array_equal(aux.expert_load, np.bincount(ids.ravel(), minlength=5))


def test_copies_of_redundant_experts_are_really_used(rng):
    layer = random_layer(rng, config(num_redundant_experts=5, top_k=1))
    x = jnp.broadcast_to(tokens(rng, 12), (8, 12))
    y = np.asarray(call(layer, x))  # the copies differ here, so equal tokens come out in two ways
    assert len(np.unique(y.round(4), axis=0)) == 2


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("input_dtype", "dtype", "expected"),
    [
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float32, None, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_layer_computes_in_the_dtype_of_its_input_unless_told_otherwise(input_dtype, dtype, expected, param_dtype, rng):
    layer = random_layer(rng, config(dtype=dtype, param_dtype=param_dtype, shared_experts=SHARED["sigmoid gate"]))
    y, aux = jax.eval_shape(lambda x: layer(x, with_aux=True), jax.ShapeDtypeStruct((3, 12), input_dtype))
    assert y.dtype == expected
    assert aux.topk_weights.dtype == jnp.float32


def test_input_whose_leading_dimensions_differ_is_refused_by_name(rng):
    layer = random_layer(rng, config())
    with pytest.raises(ValueError, match=r"router_logits must have the leading dimensions \(3,\).*got shape \(4, 5\)"):
        call(layer, tokens(rng, 3, 12), router_logits=tokens(rng, 4, 5))


@pytest.mark.parametrize("axis", ["expert_axis", "tensor_axis", "data_axis", "sequence_axis"])
def test_parallel_axes_without_a_mesh_are_refused(axis):
    with pytest.raises(ValueError, match="a layer with parallel axes needs mesh=, got None"):
        MoERunner(config(parallel=ParallelConfig(**{axis: "x"})), rngs=nnx.Rngs(0))
