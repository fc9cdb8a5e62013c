"""Tokens that `token_mask` leaves out go to no expert, on one device and on meshes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from oracles import layer as oracle
from oracles.layers_under_test import call, parameters_of, random_layer

from moe_jax import MoEConfig, ParallelConfig, RouterConfig, SharedExpertsConfig

EXPERTS, ZERO_EXPERTS = 6, 2
PARALLEL = ParallelConfig(expert_axis="expert", tensor_axis="tensor", data_axis="data")
MASK = np.array([[1, 0, 1], [0, 1, 1]])  # the layer sees six tokens in two rows


def layer_of(rng, *, axis_types=None, **changes):
    """A layer and the context to call it in; spread over eight devices if `axis_types` is given."""
    mesh, parallel, context = None, ParallelConfig(), contextlib.nullcontext()
    if axis_types is not None:
        mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(axis_types,) * 3)
        parallel = PARALLEL
        if axis_types == AxisType.Explicit:
            context = jax.set_mesh(mesh)
    settings = dict(hidden_size=12, intermediate_size=8, num_experts=EXPERTS, top_k=2, implementation="reference")
    return random_layer(rng, MoEConfig(**(settings | changes), parallel=parallel), mesh=mesh), context


def masked_route(logits, *, num_experts):
    weights, ids = oracle.softmax_router(logits, num_experts=num_experts, top_k=2)
    is_routed = MASK.reshape(-1, 1) == 1
    return weights * is_routed, np.where(is_routed, ids, -1)


@pytest.mark.parametrize("axis_types", [None, AxisType.Auto, AxisType.Explicit], ids=str)
def test_masked_tokens_go_to_no_expert_and_are_not_counted(axis_types, rng):
    layer, context = layer_of(
        rng,
        axis_types=axis_types,
        router=RouterConfig(num_zero_experts=ZERO_EXPERTS),
        shared_experts=SharedExpertsConfig(intermediate_size=8),
    )
    x = jnp.asarray(rng.normal(size=(2, 3, 12)), jnp.float32)
    with context:
        y, aux = jax.tree.map(np.asarray, call(layer, x, token_mask=jnp.asarray(MASK), with_aux=True))

    flat = np.asarray(x).reshape(6, 12)
    expected, ids = oracle.layer(flat, parameters_of(layer), route=masked_route, num_experts=EXPERTS)
    np.testing.assert_allclose(y.reshape(6, 12)[MASK.ravel() == 1], expected[MASK.ravel() == 1], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(aux.topk_ids.reshape(6, 2), ids)
    assert (aux.topk_weights[MASK == 0] == 0).all()
    np.testing.assert_array_equal(aux.expert_load, np.bincount(ids[(ids >= 0) & (ids < EXPERTS)], minlength=EXPERTS))


def test_masked_tokens_may_hold_anything(rng):
    layer, _ = layer_of(rng)
    x = jnp.asarray(rng.normal(size=(2, 3, 12)), jnp.float32)
    mask = jnp.asarray(MASK, bool)
    poisoned = jnp.where(mask[..., None], x, jnp.nan)
    y, aux = call(layer, poisoned, token_mask=mask, with_aux=True)
    clean, clean_aux = call(layer, x, token_mask=mask, with_aux=True)
    np.testing.assert_array_equal(y, clean)  # without shared experts nothing reaches the masked rows: they are zero
    np.testing.assert_array_equal(y[MASK == 0], 0)
    np.testing.assert_array_equal(aux.expert_load, clean_aux.expert_load)


@pytest.mark.parametrize("are_given", [False, True], ids=["own logits", "given logits and shared input"])
def test_masked_tokens_may_hold_anything_for_gradients_too(are_given, rng):
    layer, _ = layer_of(
        rng,
        router=RouterConfig(num_zero_experts=ZERO_EXPERTS),
        shared_experts=SharedExpertsConfig(intermediate_size=8, sigmoid_gate=True),
    )
    mask = jnp.asarray(MASK, bool)
    x = jnp.asarray(rng.normal(size=(2, 3, 12)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(2, 3, EXPERTS + ZERO_EXPERTS)), jnp.float32)

    def gradients(x, logits):
        def loss(layer, x, logits):
            given = dict(router_logits=logits, shared_experts_input=2 * x) if are_given else {}
            y = layer(x, token_mask=mask, **given)
            return jnp.sum(jnp.where(mask[..., None], y, 0) ** 2)

        return nnx.grad(loss, argnums=(0, 1, 2))(layer, x, logits)

    clean = gradients(x, logits)
    poisoned = gradients(*(jnp.where(mask[..., None], array, jnp.nan) for array in (x, logits)))
    for one, other in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(one, other)


def test_token_mask_holds_for_forced_ids_too(rng):
    layer, _ = layer_of(rng)
    x = jnp.asarray(rng.normal(size=(2, 3, 12)), jnp.float32)
    forced = jnp.asarray(np.tile([4, 1], (2, 3, 1)), jnp.int32)
    _, aux = call(layer, x, forced_ids=forced, token_mask=jnp.asarray(MASK), with_aux=True)
    np.testing.assert_array_equal(aux.topk_ids, np.where(MASK[..., None] == 1, forced, -1))
    assert aux.expert_load.tolist() == [0, 4, 0, 0, 4, 0]


def test_token_mask_of_another_shape_is_refused_by_name(rng):
    layer, _ = layer_of(rng)
    with pytest.raises(ValueError, match=r"token_mask must have the leading dimensions \(2, 3\) .* got shape \(6,\)"):
        call(layer, jnp.zeros((2, 3, 12)), token_mask=jnp.ones(6))
