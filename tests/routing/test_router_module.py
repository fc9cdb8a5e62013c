"""`Router`: parameters, logits in float32, gradients, and agreement with the pure function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import routing as oracle

from moe_jax.config import GroupLimit, MoEConfig, RouterConfig
from moe_jax.routing import Router, RoutingBuffer

H, E, K, T = 24, 9, 3, 10

call = nnx.jit(lambda router, hidden_states, **kwargs: router(hidden_states, **kwargs))


SOFTMAX = RouterConfig()


def make_config(router=SOFTMAX, **changes):
    return MoEConfig(hidden_size=H, intermediate_size=4, num_experts=E, top_k=K, router=router, **changes)


def make_router(router_config=SOFTMAX, **changes):
    return Router(make_config(router_config, **changes), rngs=nnx.Rngs(0))


EVERYTHING = RouterConfig(
    scoring="sigmoid",
    correction_bias=True,
    logits_bias=True,
    normalize_input=True,
    per_expert_scale=True,
    num_zero_experts=2,
    input_norm_epsilon=0.1,
)


def test_parameters_are_those_that_the_configuration_asks_for():
    shapes = {
        "weight": (E + 2, H),
        "bias": (E + 2,),
        "input_scale": (H,),
        "per_expert_scale": (E + 2,),
        "correction_bias": (E + 2,),
    }
    state = nnx.to_pure_dict(nnx.state(make_router(EVERYTHING)))
    assert {name: value.shape for name, value in state.items()} == shapes
    assert set(nnx.to_pure_dict(nnx.state(make_router()))) == {"weight"}


def test_parameters_take_param_dtype_but_the_correction_bias_stays_float32():
    state = nnx.to_pure_dict(nnx.state(make_router(EVERYTHING, param_dtype=jnp.bfloat16)))
    dtypes = {name: value.dtype for name, value in state.items()}
    assert dtypes.pop("correction_bias") == jnp.float32
    assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}


def test_buffers_are_not_trained():
    router = make_router(RouterConfig(correction_bias=True))
    assert isinstance(router.correction_bias, RoutingBuffer)
    gradients = nnx.jit(nnx.grad(lambda r, x: r(x).topk_weights[:, 0].sum()))(router, jnp.ones((2, H)))
    assert set(nnx.to_pure_dict(gradients)) == {"weight"}
    table = make_router(RouterConfig(hash_vocab_size=7)).hash_table
    assert isinstance(table, RoutingBuffer)
    assert (table.shape, table.dtype) == ((7, K), jnp.int32)


def test_the_initial_weight_has_the_variance_of_one_over_hidden_size():
    config = dataclasses.replace(make_config(), hidden_size=256, num_experts=512)
    weight = np.asarray(Router(config, rngs=nnx.Rngs(1)).weight[...])
    np.testing.assert_allclose(weight.var(), 1 / 256, rtol=0.05)


def test_a_router_may_see_wider_tokens_than_the_experts():
    router = Router(make_config(), hidden_size=2 * H, rngs=nnx.Rngs(0))
    assert call(router, jnp.ones((3, 2 * H))).topk_ids.shape == (3, K)


def test_it_routes_as_the_oracle_does_from_the_same_parameters(rng):
    router = make_router(EVERYTHING)
    nnx.update(
        router,
        jax.tree.map(lambda v: jnp.array(rng.normal(size=v.shape), v.dtype), nnx.state(router)),
    )
    parameters = {name: np.asarray(v, np.float64) for name, v in nnx.to_pure_dict(nnx.state(router)).items()}
    x = rng.normal(size=(T, H))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * H**-0.5 * parameters["input_scale"]
    logits = normed @ parameters["weight"].T + parameters["bias"]
    expected = oracle.route(logits, top_k=K, scoring="sigmoid", bias=parameters["correction_bias"])
    expected = expected._replace(weights=expected.weights * parameters["per_expert_scale"][expected.ids])
    output = call(router, jnp.array(x, jnp.float32))
    oracle.assert_same_routing(output, expected)
    np.testing.assert_allclose(output.router_logits, logits, rtol=1e-4, atol=1e-5)


def test_logits_are_float32_even_if_every_parameter_is_bfloat16(rng):
    router = make_router(param_dtype=jnp.bfloat16)
    x = jnp.array(rng.normal(size=(T, H)), jnp.bfloat16)
    logits = call(router, x).router_logits
    exact = np.asarray(x, np.float64) @ np.asarray(router.weight[...], np.float64).T
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-6)


def test_logits_from_outside_replace_its_own(rng):
    router = make_router()
    logits = rng.normal(size=(T, E)).astype(np.float32)
    output = call(router, jnp.full((T, H), jnp.nan), router_logits=jnp.array(logits))
    oracle.assert_same_routing(output, oracle.route(logits, top_k=K))
    np.testing.assert_array_equal(output.router_logits, logits)


def test_logits_from_outside_are_reported_in_float32(rng):
    logits = jnp.array(rng.normal(size=(T, E)), jnp.bfloat16)
    reported = call(make_router(), jnp.zeros((T, H)), router_logits=logits).router_logits
    assert reported.dtype == jnp.float32
    np.testing.assert_array_equal(reported, logits.astype(jnp.float32))


def test_token_ids_reach_the_hash_table(rng):
    router = make_router(RouterConfig(hash_vocab_size=7))
    ids = jnp.array(rng.integers(7, size=T), jnp.int32)
    np.testing.assert_array_equal(call(router, jnp.ones((T, H)), input_ids=ids).topk_ids, router.hash_table[...][ids])


def test_no_tokens():
    output = call(make_router(), jnp.zeros((0, H)))
    assert [x.shape for x in output] == [(0, K), (0, K), (0, E)]


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(scoring="sqrtsoftplus"),
        RouterConfig(scoring="sigmoid", correction_bias=True, group_limit=GroupLimit(num_groups=3, groups_kept=2)),
        RouterConfig(score_after_top_k=True, logits_bias=True),
    ],
    ids=["sqrtsoftplus", "groups", "score after top-k"],
)
def test_gradients_through_the_weights_match_finite_differences(config, rng):
    router = make_router(config)
    x = jnp.array(rng.normal(size=(2, H)), jnp.float32)
    forced = call(router, x).topk_ids  # finite differences must not flip a choice
    target = jnp.array(rng.normal(size=(2, K)), jnp.float32)

    @nnx.jit
    @nnx.value_and_grad
    def loss(router):
        return (router(x, forced_ids=forced).topk_weights * target).sum()

    weight, step = router.weight[...], 1e-2
    direction = jnp.array(rng.normal(size=weight.shape), jnp.float32)
    gradient = loss(router)[1].weight[...]
    losses = []
    for sign in (1, -1):
        router.weight[...] = weight + sign * step * direction
        losses.append(loss(router)[0])
    estimate = (losses[0] - losses[1]) / (2 * step)
    assert np.abs(gradient).max() > 0
    np.testing.assert_allclose((gradient * direction).sum(), estimate, rtol=2e-2, atol=2e-3)


def test_forced_choice_and_free_choice_have_the_same_gradient(rng):
    router = make_router(RouterConfig(scoring="sigmoid"))
    x = jnp.array(rng.normal(size=(T, H)), jnp.float32)
    gradient = nnx.jit(nnx.grad(lambda r, forced_ids: (r(x, forced_ids=forced_ids).topk_weights ** 2).sum()))
    free, forced = gradient(router, None), gradient(router, call(router, x).topk_ids)
    np.testing.assert_allclose(free.weight[...], forced.weight[...], rtol=1e-6, atol=1e-7)


def test_wrong_shapes_are_refused():
    router = make_router()
    with pytest.raises(ValueError, match=r"router_logits must have shape \[2, 9\], got \[2, 8\]"):
        router(jnp.zeros((2, H)), router_logits=jnp.zeros((2, 8)))


@pytest.mark.parametrize("shape", [(2, H + 1), (H,), (2, 3, H)], ids=str)
def test_tokens_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match=rf"the router needs hidden_states \[T, {H}\], got shape"):
        make_router()(jnp.zeros(shape))


def test_an_unknown_simulation_is_refused_when_the_router_is_built():
    with pytest.raises(ValueError, match="simulation must be one of"):
        make_router(RouterConfig(simulation="unifrom"))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (RouterConfig(), "logits → softmax → top 3 of 9 → divide by sum"),
        (
            RouterConfig(
                scoring="sigmoid",
                correction_bias=True,
                group_limit=GroupLimit(num_groups=3, groups_kept=2),
                renormalize_epsilon=1e-20,
                routed_scaling_factor=2.5,
            ),
            "logits → sigmoid → best 2 of 3 groups by top2_sum (+ correction bias) → top 3 of 9 (+ correction bias) "
            "→ divide by sum + 1e-20 → × 2.5 (weights)",
        ),
        (
            RouterConfig(
                score_after_top_k=True, logits_bias=True, renormalize=False, round_weights_to_input_dtype=True
            ),
            "logits + bias → top 3 of 9 → softmax → round to the input's dtype",
        ),
        (
            RouterConfig(renormalize=False, num_zero_experts=2, routed_scaling_factor=6.0, correction_bias=True),
            "logits → softmax → top 3 of 9 + 2 zero experts (+ correction bias) → × 6 (weights)",
        ),
        (
            RouterConfig(hash_vocab_size=5, apply_scale_to_output=True, routed_scaling_factor=1.5),
            "logits → softmax → 3 of 9 by token id → divide by sum → × 1.5 (routed output, by the runner)",
        ),
        (
            RouterConfig(normalize_input=True, per_expert_scale=True),
            "RMS norm × H**-0.5 × learned scale → logits → softmax → top 3 of 9 → divide by sum "
            "→ × learned scale of the expert",
        ),
        (RouterConfig(simulation="uniform_random"), "simulated uniform_random, 3 of 9"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_a_router_says_what_it_does(config, text):
    assert make_router(config).describe() == text
