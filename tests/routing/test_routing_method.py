"""vLLM's names for what a configuration does (spec 2.1 and 2.2)."""

import pytest

from moe_jax.config import GroupLimit, RouterConfig
from moe_jax.routing import (
    RouterClass,
    RoutingMethodType,
    get_routing_method_type,
    resolve_router_class,
    routing_method_type,
)

ONE_GROUP = GroupLimit(num_groups=1, groups_kept=1)
EIGHT_GROUPS = GroupLimit(num_groups=8, groups_kept=4)


def custom(hidden_states, router_logits, top_k, renormalize):
    raise AssertionError("naming a router must not run it")


def test_numbers_are_upstreams():
    assert {method.name: method.value for method in RoutingMethodType} == {
        "DEFAULT": 0,
        "RENORMALIZE": 1,
        "DEEPSEEK_V3": 2,
        "LLAMA4": 3,
        "RENORMALIZE_NAIVE": 4,
        "TOP_K": 5,
        "SIGMOID_RENORM": 6,
        "MINIMAX2": 7,
        "SIGMOID": 8,
        "UNSPECIFIED": 9,
        "DEEPSEEK_V4": 100,
        "CUSTOM": 101,
        "SIMULATED": 102,
    }


@pytest.mark.parametrize(
    ("scoring", "bias", "renormalize", "scale", "expected"),
    [
        ("softmax", False, True, 1.0, RouterClass.FUSED_TOP_K),
        ("softmax", True, True, 1.1, RouterClass.FUSED_TOP_K_BIAS),
        ("sigmoid", True, True, 1.0, RouterClass.GROUPED_TOP_K),
        ("softmax", False, True, 1.1, RouterClass.GROUPED_TOP_K),
    ],
)
def test_one_group_that_is_kept_limits_nothing(scoring, bias, renormalize, scale, expected):
    config = RouterConfig(
        scoring=scoring,
        correction_bias=bias,
        renormalize=renormalize,
        routed_scaling_factor=scale,
        group_limit=ONE_GROUP,
    )
    assert resolve_router_class(config) == expected
    if scoring == "sigmoid":
        assert routing_method_type(config, 8) == RoutingMethodType.DEEPSEEK_V3


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_eight_groups_always_need_the_grouped_router(scoring, bias, renormalize, scale):
    config = RouterConfig(
        scoring=scoring,
        correction_bias=bias,
        renormalize=renormalize,
        routed_scaling_factor=scale,
        group_limit=EIGHT_GROUPS,
    )
    assert resolve_router_class(config) == RouterClass.GROUPED_TOP_K


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RouterConfig(simulation="uniform_random", group_limit=EIGHT_GROUPS), RouterClass.ROUTING_SIMULATOR),
        (RouterConfig(num_zero_experts=4, correction_bias=True), RouterClass.ZERO_EXPERT),
        (RouterConfig(custom=custom), RouterClass.CUSTOM_ROUTING),
        (RouterConfig(sparsemixer_jitter=0.01, renormalize=False), RouterClass.CUSTOM_ROUTING),
        (RouterConfig(score_after_top_k=True), RouterClass.CUSTOM_ROUTING),
        (RouterConfig(per_expert_scale=True), RouterClass.CUSTOM_ROUTING),
        (RouterConfig(correction_bias=True), RouterClass.FUSED_TOP_K_BIAS),
        (RouterConfig(hash_vocab_size=10), RouterClass.FUSED_TOP_K_BIAS),
        (RouterConfig(), RouterClass.FUSED_TOP_K),
    ],
    ids=lambda value: value.value if isinstance(value, RouterClass) else "",
)
def test_router_classes_are_considered_in_upstreams_order(config, expected):
    assert resolve_router_class(config) == expected


@pytest.mark.parametrize(
    ("scoring", "renormalize", "bias", "groups", "scale", "expected"),
    [
        ("sqrtsoftplus", True, True, None, 1.5, "DEEPSEEK_V4"),
        ("sqrtsoftplus", False, True, None, 1.5, "UNSPECIFIED"),
        ("sigmoid", False, True, 8, 2.5, "UNSPECIFIED"),
        ("sigmoid", True, True, 8, 2.5, "DEEPSEEK_V3"),
        ("sigmoid", True, True, 1, None, "DEEPSEEK_V3"),
        ("sigmoid", True, True, None, None, "MINIMAX2"),
        ("sigmoid", True, True, 0, 1.0, "MINIMAX2"),
        ("sigmoid", True, True, None, 2.5, "UNSPECIFIED"),
        ("softmax", True, True, None, None, "UNSPECIFIED"),
        ("sigmoid", True, False, None, None, "SIGMOID_RENORM"),
        ("sigmoid", False, False, None, None, "SIGMOID"),
        ("softmax", True, False, None, None, "RENORMALIZE_NAIVE"),
        ("softmax", False, False, None, None, "DEFAULT"),
    ],
)
def test_method_of_a_score_and_choose_router(scoring, renormalize, bias, groups, scale, expected):
    method = get_routing_method_type(
        scoring, renormalize=renormalize, has_bias=bias, num_expert_group=groups, routed_scaling_factor=scale
    )
    assert method.name == expected


@pytest.mark.parametrize(
    ("config", "top_k", "expected"),
    [
        (RouterConfig(score_after_top_k=True, logits_bias=True), 4, "RENORMALIZE"),
        (RouterConfig(score_after_top_k=True, scoring="sigmoid", renormalize=False), 1, "LLAMA4"),
        (RouterConfig(score_after_top_k=True, scoring="sigmoid", renormalize=False), 2, "UNSPECIFIED"),
        (RouterConfig(score_after_top_k=True, scoring="sigmoid"), 1, "UNSPECIFIED"),
        (RouterConfig(score_after_top_k=True, correction_bias=True), 2, "UNSPECIFIED"),
        (RouterConfig(custom=custom), 2, "CUSTOM"),
        (RouterConfig(simulation="uniform_random", correction_bias=True), 2, "SIMULATED"),
        (RouterConfig(num_zero_experts=2), 2, "UNSPECIFIED"),
        (RouterConfig(num_zero_experts=2, correction_bias=True), 2, "UNSPECIFIED"),
        (RouterConfig(num_zero_experts=2, score_after_top_k=True), 2, "UNSPECIFIED"),
        (RouterConfig(per_expert_scale=True, score_after_top_k=True), 2, "UNSPECIFIED"),
        (
            RouterConfig(per_expert_scale=True, score_after_top_k=True, scoring="sigmoid", renormalize=False),
            1,
            "UNSPECIFIED",
        ),
        (RouterConfig(sparsemixer_jitter=0.01, renormalize=False), 2, "UNSPECIFIED"),
        (RouterConfig(scoring="sigmoid", correction_bias=True), 2, "MINIMAX2"),
        (RouterConfig(scoring="sigmoid", correction_bias=True, routed_scaling_factor=2.0), 2, "UNSPECIFIED"),
        (
            RouterConfig(
                scoring="sigmoid", correction_bias=True, routed_scaling_factor=2.0, apply_scale_to_output=True
            ),
            2,
            "MINIMAX2",
        ),
        (RouterConfig(), 2, "RENORMALIZE_NAIVE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_method_of_a_configuration(config, top_k, expected):
    assert routing_method_type(config, top_k).name == expected
