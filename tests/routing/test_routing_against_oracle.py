"""Every score-and-choose router against float64 numpy, over upstream's grid (spec 2.11) and beyond it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import routing as oracle

from moe_jax import routing
from moe_jax.config import GroupLimit, RouterConfig

NUM_TOKENS = 32

route = jax.jit(routing.route, static_argnums=(1, 2, 3))
assert_same = oracle.assert_same_routing


def draw_logits(rng, num_experts, num_tokens=NUM_TOKENS):
    return rng.normal(size=(num_tokens, num_experts)).astype(np.float32)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 6), (16, 2), (64, 4)])
def test_top_k_and_bias_routers_on_upstreams_grid(num_experts, top_k, scoring, rng):
    logits = draw_logits(rng, num_experts, num_tokens=64)
    plain = RouterConfig(scoring=scoring)
    assert_same(route(jnp.array(logits), plain, num_experts, top_k), oracle.route(logits, top_k=top_k, scoring=scoring))

    biased = RouterConfig(scoring=scoring, correction_bias=True, routed_scaling_factor=1.1)
    bias = np.full(num_experts, 0.9, np.float32)
    actual = route(jnp.array(logits), biased, num_experts, top_k, correction_bias=jnp.array(bias))
    assert_same(actual, oracle.route(logits, top_k=top_k, scoring=scoring, bias=bias, scale=1.1))


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "kept", "top_k", "scoring", "biased"),
    [
        (64, 8, 4, 6, "sigmoid", True),
        (64, 8, 4, 2, "softmax", False),
        (32, 4, 2, 4, "softmax", True),
        (32, 4, 2, 6, "sigmoid", False),
    ],
)
def test_grouped_router_on_upstreams_grid(num_experts, num_groups, kept, top_k, scoring, biased, rng):
    logits = draw_logits(rng, num_experts)
    kind = "top2_sum" if biased else "max"
    config = RouterConfig(
        scoring=scoring,
        correction_bias=biased,
        group_limit=GroupLimit(num_groups=num_groups, groups_kept=kept, score=kind),
        routed_scaling_factor=1.1,
    )
    bias = rng.normal(size=num_experts).astype(np.float32) if biased else None
    actual = route(
        jnp.array(logits), config, num_experts, top_k, correction_bias=None if bias is None else jnp.array(bias)
    )
    groups = (num_groups, kept, kind, -np.inf)
    assert_same(actual, oracle.route(logits, top_k=top_k, scoring=scoring, bias=bias, groups=groups, scale=1.1))


@pytest.mark.parametrize("masked_score", [0.0, float("-inf")])
@pytest.mark.parametrize("score", ["max", "top2_sum"])
def test_what_masked_groups_score_matters_when_biased_scores_are_negative(score, masked_score, rng):
    logits = draw_logits(rng, 9)
    bias = rng.uniform(-2, -1, size=9).astype(np.float32)  # every biased sigmoid score is below 0
    limit = GroupLimit(num_groups=3, groups_kept=2, score=score, masked_score=masked_score)
    config = RouterConfig(scoring="sigmoid", correction_bias=True, group_limit=limit)
    actual = route(jnp.array(logits), config, 9, 3, correction_bias=jnp.array(bias))
    expected = oracle.route(logits, top_k=3, scoring="sigmoid", bias=bias, groups=(3, 2, score, masked_score))
    np.testing.assert_array_equal(np.asarray(actual.topk_ids)[:, 0], expected.ids[:, 0])
    assert_same(actual, expected._replace(margin=np.ones(NUM_TOKENS)) if masked_score == 0 else expected)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score_after_top_k", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_any_scoring_before_or_after_the_choice(scoring, score_after_top_k, renormalize, rng):
    logits = 3 * draw_logits(rng, 13)
    config = RouterConfig(scoring=scoring, score_after_top_k=score_after_top_k, renormalize=renormalize)
    expected = oracle.route(logits, top_k=5, scoring=scoring, score_after=score_after_top_k, renormalize=renormalize)
    actual = route(jnp.array(logits), config, 13, 5)
    assert_same(actual, expected)
    assert (np.diff(actual.topk_weights) <= 0).all(), "experts come best first"


@pytest.mark.parametrize("epsilon", [0.0, 1e-20, 0.5])
def test_epsilon_of_the_renormalisation_is_added_to_the_sum(epsilon, rng):
    logits = draw_logits(rng, 8)
    config = RouterConfig(scoring="sigmoid", renormalize_epsilon=epsilon)
    assert_same(
        route(jnp.array(logits), config, 8, 3), oracle.route(logits, top_k=3, scoring="sigmoid", epsilon=epsilon)
    )


def test_sparsemixer_on_crowded_logits(rng):
    logits = (rng.uniform(0.9, 1.1, size=(64, 7)) * rng.choice([1, -1, 5], size=(64, 1))).astype(np.float32)
    config = RouterConfig(sparsemixer_jitter=0.01, renormalize=False)
    assert_same(route(jnp.array(logits), config, 7, 2), oracle.sparsemixer(logits, 0.01))


def test_gemma4_multiplies_each_weight_by_a_scale_of_its_expert(rng):
    logits = draw_logits(rng, 11)
    scale = rng.uniform(0.5, 2, size=11).astype(np.float32)
    expected = oracle.route(logits, top_k=4)
    actual = route(jnp.array(logits), RouterConfig(per_expert_scale=True), 11, 4, per_expert_scale=jnp.array(scale))
    assert_same(actual, expected._replace(weights=expected.weights * scale[expected.ids]))


def test_zero_experts_compete_with_the_real_ones(rng):
    logits = draw_logits(rng, 12)
    bias = 0.05 * rng.normal(size=12).astype(np.float32)  # of the scores' size, so that both decide
    config = RouterConfig(correction_bias=True, num_zero_experts=4, renormalize=False, routed_scaling_factor=6.0)
    actual = route(jnp.array(logits), config, 8, 5, correction_bias=jnp.array(bias))
    assert_same(actual, oracle.route(logits, top_k=5, bias=bias, renormalize=False, scale=6.0))
    assert (actual.topk_ids >= 8).any()


def test_the_correction_bias_never_enters_the_weights(rng):
    """Large against the scores, so that `biased - bias` in float32 would destroy them."""
    logits = draw_logits(rng, 16)
    bias = rng.normal(size=16).astype(np.float32) * 1e4
    config = RouterConfig(correction_bias=True, renormalize=False)
    actual = route(jnp.array(logits), config, 16, 4, correction_bias=jnp.array(bias))
    assert_same(actual, oracle.route(logits, top_k=4, bias=bias, renormalize=False), tolerance=1e-6)
