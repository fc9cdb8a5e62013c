"""Ties, sizes at the edge of the legal, and numbers that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import routing as oracle

from moe_jax import routing
from moe_jax.config import GroupLimit, RouterConfig
from moe_jax.routing.selection import keep_best_groups, top_k_lowest_index

route = jax.jit(routing.route, static_argnums=(1, 2, 3))

EVERY_WAY_TO_CHOOSE = {
    "softmax": RouterConfig(),
    "sigmoid": RouterConfig(scoring="sigmoid"),
    "score after top-k": RouterConfig(score_after_top_k=True),
    "groups": RouterConfig(group_limit=GroupLimit(num_groups=4, groups_kept=2, score="max")),
    "groups by two": RouterConfig(group_limit=GroupLimit(num_groups=4, groups_kept=2, score="top2_sum")),
    "sparsemixer": RouterConfig(sparsemixer_jitter=0.01, renormalize=False),
}
every_way_to_choose = pytest.mark.parametrize("config", EVERY_WAY_TO_CHOOSE.values(), ids=EVERY_WAY_TO_CHOOSE.keys())


@every_way_to_choose
def test_equal_logits_choose_the_lowest_ids(config):
    ids = route(jnp.full((3, 8), 0.7), config, 8, 2).topk_ids
    np.testing.assert_array_equal(ids, [[0, 1]] * 3)


@every_way_to_choose
def test_minus_zero_and_zero_are_a_tie(config):
    logits = jnp.tile(jnp.array([-0.0, 0.0]), (2, 4))
    assert route(logits, config, 8, 2).topk_ids.tolist() == [[0, 1]] * 2


def test_ties_anywhere_in_the_row_go_to_the_lowest_index(rng):
    values = rng.choice([-1.0, -0.0, 0.0, 0.5, 2.0], size=(64, 33)).astype(np.float32)
    found, positions = jax.jit(top_k_lowest_index, static_argnums=1)(jnp.array(values), 9)
    expected = [oracle.best(row, 9)[0] for row in values]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(values, np.array(expected), -1))


def test_a_nan_of_either_sign_is_the_largest_value():
    for nan in (np.float32(np.nan), -np.float32(np.nan)):
        _, positions = jax.jit(top_k_lowest_index, static_argnums=1)(jnp.array([[1.0, nan, 3.0, nan]]), 3)
        assert positions.tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("others", [-np.inf, jnp.finfo(jnp.float32).min])
@pytest.mark.parametrize("best", [0, 3])
def test_sparsemixer_picks_two_experts_where_only_one_can_be_chosen(others, best):
    logits = np.full((1, 4), others, np.float32)
    logits[0, best] = 1
    config = EVERY_WAY_TO_CHOOSE["sparsemixer"]
    weights, ids = route(jnp.asarray(logits), config, 4, 2)
    assert ids.tolist() == [[best, 1 if best == 0 else 0]]
    assert weights[0, 0] == 1
    if np.isinf(others):
        assert weights[0, 1] == 0
    gradient = jax.grad(lambda logits: route(logits, config, 4, 2).topk_weights[0, 0])(jnp.asarray(logits))
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


@pytest.mark.parametrize("score", ["max", "top2_sum"])
def test_tied_groups_are_kept_from_the_lowest_up(score):
    limit = GroupLimit(num_groups=3, groups_kept=2, score=score)
    kept = keep_best_groups(jnp.array([[1.0, 2.0, 2.0, 1.0, 1.0, 2.0]]), limit)
    np.testing.assert_array_equal(kept, [[1.0, 2.0, 2.0, 1.0, -np.inf, -np.inf]])


def test_groups_whose_score_is_left_open_are_refused():
    with pytest.raises(ValueError, match="must be 'max' or 'top2_sum', got None"):
        keep_best_groups(jnp.zeros((1, 6)), GroupLimit(num_groups=3, groups_kept=2))


NEEDED = {
    "correction_bias": (RouterConfig(correction_bias=True), (8,)),
    "per_expert_scale": (RouterConfig(per_expert_scale=True), (8,)),
    "hash_table": (RouterConfig(hash_vocab_size=5), (5, 2)),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_parameter_that_is_missing_or_of_another_shape_or_of_no_use_is_refused(name):
    config, shape = NEEDED[name]
    logits, input_ids = jnp.zeros((1, 8)), jnp.zeros(1, jnp.int32)
    array, longer = (jnp.zeros(size, jnp.int32) for size in (shape, (shape[0] + 1, *shape[1:])))
    with pytest.raises(ValueError, match=f"the router's configuration needs {name} .*, got None"):
        route(logits, config, 8, 2, input_ids=input_ids)
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        route(logits, config, 8, 2, input_ids=input_ids, **{name: longer})
    with pytest.raises(ValueError, match=f"{name} was given, but the router's configuration has no use for it"):
        route(logits, RouterConfig(), 8, 2, **{name: array})


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 8\] .*, got 9"):
        route(jnp.zeros((1, 8)), RouterConfig(), 8, 9)


@every_way_to_choose
def test_no_tokens(config):
    weights, ids = route(jnp.zeros((0, 8)), config, 8, 2)
    assert (weights.shape, weights.dtype) == ((0, 2), jnp.float32)
    assert (ids.shape, ids.dtype) == ((0, 2), jnp.int32)


def test_every_expert_may_be_chosen_and_their_number_may_be_odd(rng):
    logits = rng.normal(size=(9, 7)).astype(np.float32)
    weights, ids = route(jnp.array(logits), RouterConfig(), 7, 7)
    oracle.assert_same_routing((weights, ids), oracle.route(logits, top_k=7))
    np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(7), (9, 1)))


def test_a_single_expert():
    weights, ids = route(jnp.array([[-3.0], [5.0]]), RouterConfig(), 1, 1)
    assert weights.tolist() == [[1.0], [1.0]]
    assert ids.tolist() == [[0], [0]]


def test_scores_that_underflow_to_nothing_leave_finite_weights():
    logits = jnp.array([[-200.0, -300.0, -250.0]])
    weights = route(logits, RouterConfig(scoring="sigmoid"), 3, 2).topk_weights
    assert np.isfinite(weights).all(), "a sum of zero counts as one"


@pytest.mark.parametrize("epsilon", [0.0, 1e-20])
@pytest.mark.parametrize("base", [-20.0, -44.0, -50.0, -80.0, -120.0, -300.0])
@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_scores_next_to_nothing_leave_finite_gradients(scoring, base, epsilon):
    steps = np.array([0.0, 0.5, 1.0, -0.3])
    config = RouterConfig(scoring=scoring, renormalize_epsilon=epsilon)

    def loss(logits):
        return route(logits, config, 4, 2).topk_weights @ jnp.array([1.0, 2.0])

    logits = jnp.array(base + steps, jnp.float32)[None]
    gradient = jax.jit(jax.grad(lambda logits: loss(logits).sum()))(logits)[0]
    # Far below zero both scores are exponentials, so renormalised weights are a softmax of the logits, or of their halves.
    slope = {"sigmoid": 1.0, "sqrtsoftplus": 0.5}[scoring]
    chosen = np.exp(slope * steps[[2, 1]])
    first, second = chosen / chosen.sum()
    exact = slope * first * second * np.array([0, 1, -1, 0])
    smallest = {"sigmoid": -85, "sqrtsoftplus": -170}[scoring]
    if base < smallest:  # the scores themselves are zero
        np.testing.assert_array_equal(gradient, 0)
    elif not epsilon or slope * base > -40:
        np.testing.assert_allclose(gradient, exact, atol=1e-4)
    assert np.isfinite(gradient).all()


@every_way_to_choose
def test_nan_logits_spoil_their_own_token_only(config, rng):
    logits = rng.normal(size=(3, 8)).astype(np.float32)
    spoilt = logits.copy()
    spoilt[1, rng.choice(8, size=rng.integers(1, 9), replace=False)] = np.nan
    weights, ids = route(jnp.array(spoilt), config, 8, 2)
    clean = route(jnp.array(logits), config, 8, 2)
    np.testing.assert_array_equal(weights[::2], clean.topk_weights[::2])
    np.testing.assert_array_equal(ids[::2], clean.topk_ids[::2])
    assert ((ids >= 0) & (ids < 8)).all()
    assert ids[1, 0] != ids[1, 1]


def test_logits_of_any_float_dtype_are_routed_in_float32():
    logits = jnp.array([[1.0, 3.0, 2.0, 0.0]], jnp.bfloat16)
    weights, _ = route(logits, RouterConfig(), 4, 2)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, [[0.731059, 0.268941]], atol=1e-6)
