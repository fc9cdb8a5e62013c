"""What surrounds a router: custom functions, simulation, fused shared and zero experts, rounding, scores."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import routing as oracle

from moe_jax import routing
from moe_jax.config import RouterConfig
from moe_jax.routing import (
    append_fused_shared_experts,
    fused_shared_expert_weight,
    register_strategy,
    split_zero_experts,
)
from moe_jax.routing.logits import compute_router_logits, normalize_router_input
from moe_jax.routing.scoring import SCORES

KEY = jax.random.key(0)

route = jax.jit(routing.route, static_argnums=(1, 2, 3))


def choose_by_hidden_size(hidden_states, router_logits, top_k, renormalize):
    """A routing function that looks at everything it is given."""
    weights, ids = jax.lax.top_k(router_logits * hidden_states.shape[-1], top_k)
    return (weights / weights.sum(-1, keepdims=True) if renormalize else weights).astype(jnp.bfloat16), ids


def test_a_custom_function_replaces_everything_before_scaling():
    config = RouterConfig(custom=choose_by_hidden_size, renormalize=False, routed_scaling_factor=0.5)
    weights, ids = route(jnp.array([[1.0, 4.0, 2.0]]), config, 3, 2, hidden_states=jnp.zeros((1, 4)))
    assert ids.tolist() == [[1, 2]]
    assert weights.tolist() == [[8.0, 4.0]]
    assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize(
    ("weights", "ids", "message"),
    [
        (
            jnp.ones((1, 3)),
            jnp.ones((1, 3), jnp.int32),
            r"weights of the custom routing function must have shape \[1, 2\]",
        ),
        (jnp.ones((1, 2)), jnp.ones((1, 2)), "ids of the custom routing function must be integers, got float32"),
    ],
)
def test_a_custom_function_that_returns_something_else_is_refused(weights, ids, message):
    config = RouterConfig(custom=lambda *_: (weights, ids))
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((1, 4)), config, 4, 2, hidden_states=jnp.zeros((1, 4)))


def test_a_custom_function_needs_hidden_states():
    with pytest.raises(ValueError, match="needs hidden_states"):
        route(jnp.zeros((1, 4)), RouterConfig(custom=choose_by_hidden_size), 4, 2)


def test_uniform_simulation_hits_every_expert_about_equally_with_weight_one():
    config = RouterConfig(simulation="uniform_random", routed_scaling_factor=2.0)
    weights, ids = route(jnp.zeros((4000, 5)), config, 5, 2, key=KEY)
    assert (weights == 2.0).all(), "the factor has one place, also here"
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=5) / 8000, 0.2, atol=0.03)


def test_normal_simulation_prefers_the_middle_and_its_weights_sum_to_one():
    weights, ids = route(jnp.zeros((4000, 8)), RouterConfig(simulation="normal_routing"), 8, 2, key=KEY)
    load = np.bincount(ids.ravel(), minlength=8)
    assert load.shape == (8,)
    assert load[3:5].min() > 2 * max(load[0], load[7])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (weights >= 0).all()
    # The quotient of two |N(0, 1)| is half-Cauchy: below 1/9 with this probability.
    assert np.mean(weights < 0.1) == pytest.approx(2 / np.pi * np.arctan(1 / 9), abs=0.015)
    assert abs(np.corrcoef(np.abs(ids - 3.5).ravel(), weights.ravel())[0, 1]) < 0.1


def test_simulation_overrides_any_router_and_leaves_its_parameters_unused():
    config = RouterConfig(simulation="uniform_random", hash_vocab_size=6, per_expert_scale=True, sparsemixer_jitter=0.1)
    weights, ids = route(
        jnp.full((3, 4), jnp.nan),
        config,
        4,
        2,
        key=KEY,
        hash_table=jnp.zeros((6, 2), jnp.int32),
        per_expert_scale=jnp.full(4, jnp.nan),
    )
    assert (weights == 1).all()
    assert ((ids >= 0) & (ids < 4)).all()


def test_strategies_can_be_registered_once():
    def everyone_to_the_last(key, num_tokens, num_experts, top_k):
        return jnp.ones((num_tokens, top_k)), jnp.full((num_tokens, top_k), num_experts - 1)

    register_strategy("test-last", everyone_to_the_last)
    ids = route(jnp.zeros((2, 4)), RouterConfig(simulation="test-last"), 4, 2, key=KEY).topk_ids
    assert (ids == 3).all()
    with pytest.raises(ValueError, match=r"'test-last' is already registered; registered: .*uniform_random"):
        register_strategy("test-last", everyone_to_the_last)


def test_an_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"simulation must be one of .*normal_routing.*uniform_random; got 'uniform'"):
        route(jnp.zeros((2, 4)), RouterConfig(simulation="uniform"), 4, 2, key=KEY)


def test_simulation_needs_a_key():
    with pytest.raises(ValueError, match="key must be given"):
        route(jnp.zeros((2, 4)), RouterConfig(simulation="uniform_random"), 4, 2)


@pytest.mark.parametrize(("apply_scale_to_output", "weight"), [(False, 1.0), (True, 0.4)])
def test_fused_shared_experts_count_once_after_all_scaling(apply_scale_to_output, weight):
    assert fused_shared_expert_weight(2.5, apply_scale_to_output=apply_scale_to_output) == pytest.approx(weight)
    weights, ids = append_fused_shared_experts(
        jnp.array([[0.5, 0.5]]), jnp.array([[3, 1]], jnp.int32), first_id=8, count=2, weight=weight
    )
    assert ids.tolist() == [[3, 1, 8, 9]]
    np.testing.assert_allclose(weights, [[0.5, 0.5, weight, weight]])
    assert ids.dtype == jnp.int32


def test_zero_experts_leave_no_expert_to_compute():
    split = split_zero_experts(jnp.array([[0.3, 0.2, 0.1]]), jnp.array([[9, -1, 8]]), num_experts=8)
    assert split.topk_ids.tolist() == [[-1, -1, -1]]
    np.testing.assert_allclose(split.topk_weights, [[0, 0.2, 0]])
    np.testing.assert_allclose(split.identity_weight, [0.4], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounding_gives_the_values_of_the_input_dtype_also_under_jit(dtype, rng):
    logits = jnp.array(rng.normal(size=(9, 6)), jnp.float32)
    hidden = jnp.zeros((9, 4), dtype)
    exact, _ = route(logits, RouterConfig(), 6, 3)
    config = RouterConfig(round_weights_to_input_dtype=True)
    rounded, _ = route(logits, config, 6, 3, hidden_states=hidden)
    assert rounded.dtype == jnp.float32
    numpy_dtype = {jnp.bfloat16: ml_dtypes.bfloat16}.get(dtype, dtype)
    expected = np.asarray(exact).astype(numpy_dtype).astype(np.float32)
    np.testing.assert_allclose(rounded, expected, rtol=1e-6 if dtype == jnp.float32 else 0)


def test_slots_without_an_expert_weigh_nothing_whatever_a_custom_function_says():
    def one_expert_at_most(hidden_states, router_logits, top_k, renormalize):
        return jnp.array([[0.5, jnp.nan]]), jnp.array([[2, -1]])

    weights, _ = route(
        jnp.zeros((1, 3)), RouterConfig(custom=one_expert_at_most), 3, 2, hidden_states=jnp.zeros((1, 4))
    )
    assert weights.tolist() == [[0.5, 0]]


def test_token_ids_of_few_bits_find_their_row_of_a_long_table():
    table = (jnp.arange(2 * 40_000).reshape(-1, 2) % 4).astype(jnp.int8)
    ids = jnp.array([1, 127, -1], jnp.int8)
    config = RouterConfig(hash_vocab_size=40_000)
    chosen = route(jnp.zeros((3, 4)), config, 4, 2, hash_table=table, input_ids=ids).topk_ids
    assert chosen.dtype == jnp.int32
    np.testing.assert_array_equal(chosen, [*table[jnp.array([1, 127])], [-1, -1]])


def test_scale_on_the_output_leaves_the_weights_alone(rng):
    logits = jnp.array(rng.normal(size=(5, 6)), jnp.float32)
    plain, _ = route(logits, RouterConfig(), 6, 2)
    by_router, _ = route(logits, RouterConfig(routed_scaling_factor=2.5), 6, 2)
    by_runner, _ = route(logits, RouterConfig(routed_scaling_factor=2.5, apply_scale_to_output=True), 6, 2)
    np.testing.assert_array_equal(by_runner, plain)
    np.testing.assert_allclose(by_router, 2.5 * plain, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_gemma4_normalises_the_router_input_in_float32(epsilon, dtype, rng):
    x = jnp.array(rng.normal(size=(5, 12)) * rng.uniform(0.1, 100, size=(5, 1)), dtype)
    scale = jnp.array(rng.uniform(0.5, 2, size=12), dtype)
    exact = np.float64(x)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + epsilon) * 12**-0.5 * np.float64(scale)
    actual = normalize_router_input(x, scale, epsilon=epsilon)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_logits_are_multiplied_in_true_float32_where_the_hardware_would_round():
    jaxpr = jax.make_jaxpr(compute_router_logits)(jnp.ones((3, 4)), jnp.ones((5, 4)))
    (product,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("scoring", sorted(SCORES))
def test_scores_and_their_gradients_are_right_and_finite_over_the_whole_range(scoring):
    points = np.concatenate([np.linspace(-40, 40, 81), [-30.0, -30.000001, -85.0, -99.0, 85.0]]).astype(np.float32)
    row = np.stack([points, np.zeros_like(points)], -1)
    np.testing.assert_allclose(SCORES[scoring](jnp.array(row)), oracle.score(row, scoring), rtol=2e-5, atol=1e-37)
    extremes = jnp.array([[-3e4, 0.0], [-200.0, 0.0], [3e4, 0.0]])
    gradient = jax.jit(jax.grad(lambda x: SCORES[scoring](x)[:, 0].sum()))(extremes)
    assert np.isfinite(gradient).all()
