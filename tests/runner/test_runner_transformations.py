"""The layer as a citizen of JAX and Flax: gradients, scans over layers, donation, splitting, and what it prints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import layer as oracle
from oracles.layers_under_test import call, parameters_of, random_layer

from moe_jax import MoEAux, MoEConfig, RouterConfig, SharedExpertsConfig

CONFIG = MoEConfig(
    hidden_size=6,
    intermediate_size=7,
    num_experts=5,
    top_k=2,
    router=RouterConfig(correction_bias=True, routed_scaling_factor=1.5),
    shared_experts=SharedExpertsConfig(intermediate_size=3, sigmoid_gate=True),
    expert_bias=True,
    implementation="reference",
)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)


def test_gradients_equal_central_differences_of_the_oracle(x, rng):
    layer = random_layer(rng, CONFIG)
    direction = rng.normal(size=x.shape)
    parameters = parameters_of(layer)
    ids = np.asarray(call(layer, x, with_aux=True)[1].topk_ids)

    def replay(logits, *, num_experts):
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        weights = np.take_along_axis(scores, ids, axis=-1)
        return 1.5 * weights / weights.sum(axis=-1, keepdims=True), ids

    def expected_loss(parameters, x):
        return (oracle.layer(x, parameters, route=replay, num_experts=5)[0] * direction).sum()

    loss = nnx.jit(nnx.grad(lambda layer, x: (layer(x) * direction).sum(), argnums=(0, 1)))
    gradients, gradient_of_x = loss(layer, x)
    assert not any("correction_bias" in path for path, _ in nnx.to_flat_state(gradients))
    for path, leaf in [*nnx.to_flat_state(gradients), (None, gradient_of_x)]:
        gradient = np.asarray(leaf[...])
        index = tuple(int(rng.integers(size)) for size in gradient.shape)
        shifted = []
        for step in (1e-5, -1e-5):
            moved, tokens = jax.tree.map(np.copy, parameters), np.asarray(x, np.float64).copy()
            target = tokens if path is None else functools.reduce(lambda node, name: node[name], path, moved)
            target[index] += step
            shifted.append(expected_loss(moved, tokens))
        np.testing.assert_allclose(
            gradient[index], (shifted[0] - shifted[1]) / 2e-5, rtol=2e-3, atol=2e-4, err_msg=path
        )


def stack(states):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def test_scanned_layers_report_ids_and_loads_per_layer(x, rng):
    layers = [random_layer(rng, CONFIG) for _ in range(3)]
    graph, _ = nnx.split(layers[0])

    @jax.jit
    def scanned(states, x):
        def body(x, state):
            y, aux = nnx.merge(graph, state)(x, with_aux=True)
            return x + y, aux

        return jax.lax.scan(body, x, states)

    y, aux = scanned(stack([nnx.state(layer) for layer in layers]), x)
    assert isinstance(aux, MoEAux)
    assert aux.topk_ids.shape == (3, 4, 2)
    assert aux.expert_load.shape == (3, 5)
    assert aux.dropped_rows.tolist() == [0, 0, 0]

    expected = np.asarray(x, np.float64)
    for index, layer in enumerate(layers):
        parameters = parameters_of(layer)
        route = functools.partial(_biased_softmax_router, bias=parameters["router"]["correction_bias"])
        output, ids = oracle.layer(expected, parameters, route=route, num_experts=5)
        expected = expected + output
        np.testing.assert_array_equal(aux.topk_ids[index], ids)
        np.testing.assert_array_equal(aux.expert_load[index], np.bincount(ids.ravel(), minlength=5))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def _biased_softmax_router(logits, *, num_experts, bias):
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    ids = np.argsort(-(scores + bias), axis=-1, kind="stable")[:, :2]
    weights = np.take_along_axis(scores, ids, axis=-1)
    return 1.5 * weights / weights.sum(axis=-1, keepdims=True), ids


def test_layers_stacked_by_flax_are_scanned_by_flax(x, rng):
    layers = [random_layer(rng, CONFIG) for _ in range(2)]
    graph, _ = nnx.split(layers[0])
    stacked = nnx.merge(graph, stack([nnx.state(layer) for layer in layers]))

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def scanned(x, layer):
        y, aux = layer(x, with_aux=True)
        return x + y, aux.expert_load

    y, loads = scanned(x, stacked)
    expected = x
    for layer in layers:
        expected = expected + call(layer, expected)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert loads.sum(axis=1).tolist() == [8, 8]


def test_donated_parameters_are_updated_in_place(x, rng):
    layer = random_layer(rng, CONFIG)
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    parameters = jax.tree.map(jnp.copy, parameters)  # numpy shares the memory of the originals
    leaf = parameters["routed_experts"]["down_proj"][...]

    def loss(parameters):
        return (nnx.merge(graph, parameters, rest)(x) ** 2).sum()

    def step(parameters):
        return jax.tree.map(lambda value, gradient: value - 0.1 * gradient, parameters, jax.grad(loss)(parameters))

    expected = jax.jit(step)(parameters)
    assert not jnp.array_equal(leaf, expected["routed_experts"]["down_proj"][...])
    updated = jax.jit(step, donate_argnums=0)(parameters)
    assert leaf.is_deleted()
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), updated, expected)


def test_split_and_merged_layer_is_the_same_layer(x, rng):
    layer = random_layer(rng, CONFIG)
    merged = nnx.merge(*nnx.split(layer))
    np.testing.assert_array_equal(call(merged, x), call(layer, x))
    assert merged.scaling_plan == layer.scaling_plan


def test_equal_layers_share_one_compilation(x, rng):
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    run(random_layer(rng, CONFIG), x)
    run(random_layer(rng, CONFIG), x)
    assert len(traces) == 1


def test_repr_shows_who_scales_and_who_reduces(rng):
    text = repr(random_layer(rng, CONFIG))
    assert "ScalingPlan(factor=1.5, applied_to='router weights'" in text
    assert "ReductionPlan(num_ranks=1" in text
