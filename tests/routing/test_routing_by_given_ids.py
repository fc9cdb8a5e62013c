"""Ids that do not come from the logits: forced, captured and replayed, or looked up by token id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import routing as oracle

from moe_jax import routing
from moe_jax.config import GroupLimit, RouterConfig
from moe_jax.routing.hash_table import default_hash_table

E, K, T = 8, 3, 16

route = jax.jit(routing.route, static_argnums=(1, 2, 3))


def draw_ids(rng, num_tokens=T, top_k=K, num_experts=E):
    return np.array([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)], np.int32)


FORCED_CASES = [
    {},
    {"scoring": "sigmoid", "renormalize": False},
    {"scoring": "sqrtsoftplus", "scale": 2.5},
    {"score_after": True},
    {"score_after": True, "scoring": "sigmoid"},
]


@pytest.mark.parametrize("case", FORCED_CASES, ids=str)
def test_forced_ids_get_the_weights_of_their_scores(case, rng):
    logits, ids = rng.normal(size=(T, E)).astype(np.float32), draw_ids(rng)
    ids[rng.random(ids.shape) < 0.3] = -1
    ids[0] = -1
    config = RouterConfig(
        scoring=case.get("scoring", "softmax"),
        score_after_top_k=case.get("score_after", False),
        renormalize=case.get("renormalize", True),
        routed_scaling_factor=case.get("scale", 1.0),
    )
    actual = route(jnp.array(logits), config, E, K, forced_ids=jnp.array(ids))
    np.testing.assert_array_equal(actual.topk_ids, ids)
    expected = oracle.route(logits, top_k=K, forced_ids=ids, **case)
    np.testing.assert_allclose(actual.topk_weights, expected.weights, rtol=1e-5, atol=1e-7)
    assert (np.asarray(actual.topk_weights)[ids < 0] == 0).all()


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(),
        RouterConfig(scoring="sigmoid", correction_bias=True, group_limit=GroupLimit(num_groups=4, groups_kept=2)),
        RouterConfig(score_after_top_k=True),
        RouterConfig(sparsemixer_jitter=0.01, renormalize=False),
        RouterConfig(num_zero_experts=2, renormalize=False),
        RouterConfig(per_expert_scale=True),
    ],
    ids=["softmax", "groups", "score after top-k", "sparsemixer", "zero experts", "per-expert scale"],
)
def test_captured_ids_replay_to_the_same_weights(config, rng):
    candidates = E + config.num_zero_experts
    logits = jnp.array(rng.normal(size=(T, candidates)), jnp.float32)
    parameters = {
        name: jnp.array(rng.uniform(0.5, 1.5, size=candidates), jnp.float32)
        for name in ("correction_bias", "per_expert_scale")
        if getattr(config, name)
    }
    captured = route(logits, config, E, 2, **parameters)
    replayed = route(logits, config, E, 2, forced_ids=captured.topk_ids.astype(jnp.int8), **parameters)
    np.testing.assert_array_equal(replayed.topk_ids, captured.topk_ids)
    assert replayed.topk_ids.dtype == jnp.int32
    np.testing.assert_allclose(replayed.topk_weights, captured.topk_weights, rtol=1e-6)  # two compilations


def test_every_negative_id_is_reported_as_no_expert(rng):
    logits = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    weights, ids = route(logits, RouterConfig(renormalize=False), 5, 2, forced_ids=jnp.array([[0, -7], [-2, 1]]))
    assert ids.tolist() == [[0, -1], [-1, 1]]
    np.testing.assert_array_equal(np.asarray(weights) == 0, ids < 0)

    def custom(hidden_states, router_logits, top_k, renormalize):
        return jnp.ones((2, top_k)), jnp.array([[-3, 4], [2, -1]], jnp.int8)

    config = RouterConfig(custom=custom)
    weights, ids = route(logits, config, 5, 2, hidden_states=jnp.ones((2, 3)))
    assert (ids.tolist(), weights.tolist(), ids.dtype) == ([[-1, 4], [2, -1]], [[0, 1], [1, 0]], jnp.int32)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_forced_id_that_no_expert_has_is_loud(renormalize):
    logits = jnp.zeros((2, E))
    forced = jnp.array([[0, 1], [2, E]])
    weights = route(logits, RouterConfig(renormalize=renormalize), E, 2, forced_ids=forced).topk_weights
    assert np.isfinite(weights[0]).all()
    assert np.isnan(weights[1]).all()


def test_gradients_stay_finite_where_a_token_has_no_expert(rng):
    logits = jnp.array(rng.normal(size=(3, E)), jnp.float32)
    forced = jnp.array([[-1, -1], [0, -1], [1, 2]])

    def squares(logits, config):
        return (route(logits, config, E, 2, forced_ids=forced).topk_weights ** 2).sum()

    for config in (RouterConfig(), RouterConfig(score_after_top_k=True), RouterConfig(scoring="sqrtsoftplus")):
        gradient = jax.jit(jax.grad(lambda x, config=config: squares(x, config)))(logits)
        assert np.isfinite(gradient).all()
        assert (gradient[0] == 0).all()


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        (jnp.zeros((2, 3), jnp.int32), r"forced_ids must have shape \[2, 2\], got \[2, 3\]"),
        (jnp.zeros((2, 2)), r"forced_ids must be integers, got float32"),
    ],
)
def test_wrong_forced_ids_are_refused(forced, message):
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((2, E)), RouterConfig(), E, 2, forced_ids=forced)


def test_routers_without_scores_refuse_forced_ids():
    def first_two(hidden_states, router_logits, top_k, renormalize):
        return jnp.ones((1, 2)), jnp.zeros((1, 2), jnp.int32)

    arguments = {
        "forced_ids": jnp.zeros((1, 2), jnp.int32),
        "hidden_states": jnp.zeros((1, 4)),
        "key": jax.random.key(0),
    }
    for config in (RouterConfig(simulation="uniform_random"), RouterConfig(custom=first_two)):
        with pytest.raises(ValueError, match="forced_ids have no weights under"):
            route(jnp.zeros((1, E)), config, E, 2, **arguments)


HASH = RouterConfig(scoring="sqrtsoftplus", hash_vocab_size=20, routed_scaling_factor=1.5)


def test_hash_routing_takes_ids_from_the_table_and_weights_from_the_logits(rng):
    logits = rng.normal(size=(T, E)).astype(np.float32)
    table = draw_ids(rng, num_tokens=20)
    input_ids = rng.integers(0, 20, size=T)
    actual = route(jnp.array(logits), HASH, E, K, hash_table=jnp.array(table), input_ids=jnp.array(input_ids))
    expected = oracle.route(logits, top_k=K, scoring="sqrtsoftplus", scale=1.5, forced_ids=table[input_ids])
    np.testing.assert_array_equal(actual.topk_ids, table[input_ids])
    np.testing.assert_allclose(actual.topk_weights, expected.weights, rtol=1e-5)


@pytest.mark.parametrize("padding", [-1, 20, 10_000])
def test_a_token_id_outside_the_hash_table_gets_no_expert(padding, rng):
    table = jnp.array(draw_ids(rng, num_tokens=20))
    weights, ids = route(jnp.zeros((1, E)), HASH, E, K, hash_table=table, input_ids=jnp.array([padding]))
    assert ids.tolist() == [[-1] * K]
    assert weights.tolist() == [[0.0] * K]


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (None, r"input_ids \[T\] must be given, got None"),
        (jnp.zeros(2, jnp.int32), r"input_ids must have shape \[1\], got \[2\]"),
        (jnp.zeros(1), "input_ids must be integers, got float32"),
    ],
    ids=["none", "too many", "floats"],
)
def test_hash_routing_needs_the_id_of_every_token(input_ids, message, rng):
    table = jnp.array(draw_ids(rng, num_tokens=20))
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((1, E)), HASH, E, K, hash_table=table, input_ids=input_ids)


def test_an_id_in_the_hash_table_that_no_expert_has_is_loud(rng):
    table = jnp.array(draw_ids(rng, num_tokens=20)).at[3, 1].set(E)
    weights = route(jnp.zeros((2, E)), HASH, E, K, hash_table=table, input_ids=jnp.array([3, 4])).topk_weights
    assert np.isnan(weights[0]).all()
    assert np.isfinite(weights[1]).all()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 3), (7, 7), (5, 1), (6, 4)])
def test_the_initial_hash_table_names_distinct_experts_and_spreads_the_load(num_experts, top_k):
    table = np.asarray(default_hash_table(210, num_experts, top_k))
    assert (np.sort(table)[:, 1:] != np.sort(table)[:, :-1]).all()
    assert set(np.unique(table)) == set(range(num_experts))
    if top_k < num_experts:
        load = np.bincount(table.ravel())
        assert load.max() - load.min() <= top_k
