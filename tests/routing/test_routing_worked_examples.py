"""The worked examples of spec 2.10, to the digits printed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.config import GroupLimit, RouterConfig
from moe_jax.routing import split_zero_experts
from moe_jax.routing.scoring import SCORES

route = jax.jit(routing.route, static_argnums=(1, 2, 3))

LOGITS = jnp.array([[1.0, 3.0, 2.0, 0.0]])
GROUP_LOGITS = jnp.array([[0.1, 0.9, 0.8, 0.7, 2.0, -3.0, 0.0, 0.2]])


def assert_digits(actual, printed):
    np.testing.assert_allclose(np.ravel(actual), printed, rtol=0, atol=0.6e-6)  # half a digit, and float32


def assert_routes(logits, config, ids, weights, *, top_k=2, **kwargs):
    result = route(logits, config, logits.shape[-1], top_k, **kwargs)
    assert result.topk_ids.tolist() == [list(ids)]
    assert_digits(result.topk_weights, weights)


@pytest.mark.parametrize(
    ("scoring", "printed"),
    [
        ("softmax", [0.087144, 0.643914, 0.236883, 0.032059]),
        ("sigmoid", [0.731059, 0.952574, 0.880797, 0.5]),
        ("sqrtsoftplus", [1.145976, 1.746020, 1.458399, 0.832555]),
    ],
)
def test_scores(scoring, printed):
    assert_digits(SCORES[scoring](LOGITS), printed)


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (RouterConfig(renormalize=False), (0.643914, 0.236883)),
        (RouterConfig(), (0.731059, 0.268941)),
        (RouterConfig(scoring="sigmoid"), (0.519575, 0.480425)),
        (RouterConfig(score_after_top_k=True), (0.731059, 0.268941)),
    ],
    ids=["softmax raw", "softmax renormalised", "sigmoid renormalised", "top-k then softmax"],
)
def test_top_two_of_four(config, weights):
    assert_routes(LOGITS, config, (1, 2), weights)


def test_llama4_scores_its_one_expert_with_a_sigmoid():
    config = RouterConfig(scoring="sigmoid", score_after_top_k=True, renormalize=False)
    assert_routes(LOGITS, config, (1,), (0.952574,), top_k=1)


@pytest.mark.parametrize("score", ["top2_sum", None], ids=["named", "by default"])
@pytest.mark.parametrize(("scale", "weights"), [(1.0, (0.507486, 0.492514)), (2.5, (1.268715, 1.231285))])
def test_groups_by_their_two_best_biased_scores(scale, weights, score):
    config = RouterConfig(
        scoring="sigmoid",
        correction_bias=True,
        group_limit=GroupLimit(num_groups=4, groups_kept=2, score=score),
        routed_scaling_factor=scale,
    )
    bias = jnp.zeros(8).at[4].set(-0.2)
    assert_routes(GROUP_LOGITS, config, (1, 2), weights, correction_bias=bias)


@pytest.mark.parametrize("score", ["max", None], ids=["named", "by default"])
def test_groups_by_their_best_score_without_a_correction_bias(score):
    config = RouterConfig(scoring="sigmoid", group_limit=GroupLimit(num_groups=4, groups_kept=2, score=score))
    assert_digits(
        SCORES["sigmoid"](GROUP_LOGITS), [0.524979, 0.710950, 0.689974, 0.668188, 0.880797, 0.047426, 0.5, 0.549834]
    )
    assert_routes(GROUP_LOGITS, config, (4, 1), (0.553353, 0.446647))


@pytest.mark.parametrize(
    ("logits", "weights"), [([1, 3, 2.96, 0], (0.509999, 1.0)), ([1, 3, 2, 1.99], (1.0, 0.502500))], ids=str
)
def test_sparsemixer(logits, weights):
    config = RouterConfig(sparsemixer_jitter=0.01, renormalize=False)
    assert_routes(jnp.array([logits], jnp.float32), config, (1, 2), weights)


def test_sparsemixer_without_jitter_weighs_each_pick_alone():
    assert_routes(LOGITS, RouterConfig(sparsemixer_jitter=0.0, renormalize=False), (1, 2), (1.0, 1.0))


def test_zero_experts_become_slots_without_weight_and_a_share_of_the_token():
    weights, ids, identity = split_zero_experts(
        jnp.array([[0.3, 0.2]]), jnp.array([[5, 9]]), num_experts=8, placeholder_id=0
    )
    assert ids.tolist() == [[5, 0]]
    assert_digits(weights, [0.3, 0.0])
    assert_digits(identity, [0.2])
