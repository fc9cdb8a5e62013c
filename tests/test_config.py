"""A configuration that cannot work is refused where it is written down, with the value and what would be legal."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import GroupLimit, MoEConfig, ParallelConfig, RouterConfig, SharedExpertsConfig


def custom(hidden_states, router_logits, top_k, renormalize):
    raise AssertionError("a configuration must not run it")


def layer(router=None, **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "top_k": 2}
    return MoEConfig(**sizes | changes, router=RouterConfig() if router is None else router)


def test_router_defaults_are_vllms():
    config = RouterConfig()
    assert (config.scoring, config.renormalize, config.renormalize_epsilon) == ("softmax", True, 0.0)
    assert (config.routed_scaling_factor, config.apply_scale_to_output) == (1.0, False)
    assert not config.correction_bias
    assert config.group_limit is None


def test_configurations_are_frozen_hashable_values():
    assert layer() == layer()
    assert hash(layer()) == hash(layer())
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer().top_k = 3


def test_top_k_may_reach_every_expert_and_zero_expert():
    assert layer(top_k=8).top_k == 8
    assert layer(RouterConfig(num_zero_experts=4, correction_bias=True, renormalize=False), top_k=12).top_k == 12


def test_physical_experts_count_the_redundant_ones():
    assert layer(num_redundant_experts=3).num_physical_experts == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring": "softplus"}, "scoring must be one of softmax, sigmoid, sqrtsoftplus; got 'softplus'"),
        ({"renormalize_epsilon": -1e-9}, "renormalize_epsilon must be finite and not negative, got -1e-09"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor must be positive and finite, got 0.0"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be positive and finite, got nan"),
        ({"hash_vocab_size": 0}, "hash_vocab_size must be positive, got 0"),
        ({"num_zero_experts": -1}, "num_zero_experts must not be negative, got -1"),
        ({"input_norm_epsilon": 0.0}, "input_norm_epsilon must be positive and finite, got 0.0"),
        ({"input_norm_epsilon": float("nan")}, "input_norm_epsilon must be positive and finite, got nan"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor must be positive and finite, got '2.5'"),
        ({"renormalize_epsilon": None}, "renormalize_epsilon must be finite and not negative, got None"),
        ({"num_zero_experts": 1.0}, "num_zero_experts must be an integer, got 1.0"),
        ({"hash_vocab_size": "8"}, "hash_vocab_size must be an integer, got '8'"),
        ({"group_limit": {"num_groups": 2}}, "group_limit must be GroupLimit or None, got {'num_groups': 2}"),
        ({"custom": "llama4"}, "custom must be a function, got 'llama4'"),
        ({"simulation": 3}, "simulation must be str or None, got 3"),
        ({"routed_scaling_factor": True}, "routed_scaling_factor must be positive and finite, got True"),
        ({"sparsemixer_jitter": 0.01}, "sparsemixer_jitter needs renormalize=False, got renormalize=True"),
        (
            {"sparsemixer_jitter": -1.0, "renormalize": False},
            "sparsemixer_jitter must be finite and not negative, got -1.0",
        ),
        (
            {"custom": custom, "sparsemixer_jitter": 0.01, "renormalize": False},
            "at most one of custom, sparsemixer_jitter, hash_vocab_size, group_limit may choose the experts, "
            "got custom and sparsemixer_jitter",
        ),
        (
            {"hash_vocab_size": 4, "group_limit": GroupLimit(num_groups=2, groups_kept=1)},
            "got hash_vocab_size and group_limit",
        ),
        (
            {"group_limit": GroupLimit(num_groups=2, groups_kept=1), "score_after_top_k": True},
            "score_after_top_k=True cannot be combined with group_limit",
        ),
        (
            {"hash_vocab_size": 4, "correction_bias": True},
            "correction_bias=True steers a choice by score, but hash_vocab_size chooses otherwise",
        ),
        (
            {"custom": custom, "scoring": "sigmoid"},
            "scoring='sigmoid' would be ignored, because custom does its own scoring",
        ),
        (
            {"group_limit": GroupLimit(num_groups=2, groups_kept=1), "num_zero_experts": 4},
            "num_zero_experts=4 cannot be combined with group_limit",
        ),
    ],
)
def test_routers_that_would_ignore_a_field_or_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 0}, "num_groups must be positive, got 0"),
        ({"num_groups": 2.0}, "num_groups must be an integer, got 2.0"),
        ({"groups_kept": 0}, "groups_kept must be positive, got 0"),
        ({"groups_kept": 5}, r"groups_kept must be in \[1, num_groups=4\], got 5"),
        ({"score": "sum"}, "score must be 'max' or 'top2_sum', or None; got 'sum'"),
        # NaN counts as larger than every score, so only experts outside the kept groups would be chosen.
        ({"masked_score": float("nan")}, "masked_score must be finite or -inf, got nan"),
        ({"masked_score": float("inf")}, "masked_score must be finite or -inf, got inf"),
    ],
)
def test_groups_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GroupLimit(**{"num_groups": 4, "groups_kept": 2} | changes)


def test_score_of_groups_follows_the_correction_bias_unless_it_was_asked_for():
    plain = RouterConfig(group_limit=GroupLimit(num_groups=4, groups_kept=2))
    assert plain.scored_group_limit.score == "max"
    biased = dataclasses.replace(plain, correction_bias=True)
    assert biased.scored_group_limit.score == "top2_sum"
    asked = RouterConfig(group_limit=GroupLimit(num_groups=4, groups_kept=2, score="max"))
    assert asked.scored_group_limit == plain.scored_group_limit
    assert dataclasses.replace(asked, correction_bias=True).scored_group_limit.score == "max"


def test_any_router_may_be_simulated():
    for original in (
        RouterConfig(group_limit=GroupLimit(num_groups=2, groups_kept=1), correction_bias=True),
        RouterConfig(hash_vocab_size=4),
        RouterConfig(sparsemixer_jitter=0.01, renormalize=False),
        RouterConfig(score_after_top_k=True),
    ):
        assert dataclasses.replace(original, simulation="uniform_random").simulation == "uniform_random"


@pytest.mark.parametrize(
    ("router", "changes", "message"),
    [
        ({}, {"top_k": 9}, r"top_k must be in \[1, 8\] \(experts and zero experts\), got 9"),
        ({}, {"top_k": 0}, r"top_k must be in \[1, 8\] \(experts and zero experts\), got 0"),
        (
            {"sparsemixer_jitter": 0.01, "renormalize": False},
            {"top_k": 3},
            "sparsemixer routing needs top_k=2, got 3",
        ),
        (
            {"group_limit": GroupLimit(num_groups=3, groups_kept=1)},
            {},
            "num_groups must divide num_experts=8, got 3",
        ),
        (
            {"correction_bias": True, "group_limit": GroupLimit(num_groups=8, groups_kept=4)},
            {},
            "score='top2_sum' needs at least 2 experts per group, got 1",
        ),
        (
            {"group_limit": GroupLimit(num_groups=4, groups_kept=1)},
            {"top_k": 3},
            "top_k=3 exceeds the 2 experts of groups_kept=1 groups",
        ),
        ({}, {"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({}, {"intermediate_size": -1}, "intermediate_size must be positive, got -1"),
        ({}, {"num_experts": 0}, "num_experts must be positive, got 0"),
        ({}, {"num_redundant_experts": -1}, "num_redundant_experts must not be negative, got -1"),
        ({}, {"apply_router_weight_on_input": True}, "apply_router_weight_on_input needs top_k=1, got top_k=2"),
        ({}, {"activation": "siluu"}, "siluu"),
        ({}, {"activation": max}, "activation must be str or Activation, got <built-in function max>"),
        ({}, {"hidden_size": 16.0}, "hidden_size must be an integer, got 16.0"),
        ({}, {"intermediate_size": "8"}, "intermediate_size must be an integer, got '8'"),
        ({}, {"num_experts": None}, "num_experts must be an integer, got None"),
        ({}, {"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({}, {"top_k": True}, "top_k must be an integer, got True"),
        ({}, {"num_redundant_experts": 1.0}, "num_redundant_experts must be an integer, got 1.0"),
        ({}, {"shared_experts": 8}, "shared_experts must be SharedExpertsConfig or None, got 8"),
        ({}, {"parallel": None}, "parallel must be ParallelConfig, got None"),
        ({}, {"dtype": "bf16"}, "dtype must be floating, got 'bf16', which is no dtype"),
        ({}, {"dtype": jnp.float8_e4m3fn}, "dtype must have 16 bits or more to compute with, got float8_e4m3fn"),
        (
            {},
            {"param_dtype": jnp.float8_e5m2},
            "param_dtype must have 16 bits or more to compute with, got float8_e5m2",
        ),
        (
            {},
            {"implementation": "palas_gpu"},
            "implementation must be one of 'pallas_gpu', .* or None; got 'palas_gpu'",
        ),
    ],
)
def test_layers_that_cannot_work_are_refused(router, changes, message):
    with pytest.raises(ValueError, match=message):
        layer(RouterConfig(**router), **changes)


@pytest.mark.parametrize(
    ("router", "changes", "message"),
    [
        (
            {"routed_scaling_factor": 2.5},
            {"inverse_scale_shared_in_float16": True},
            "inverse_scale_shared_in_float16 needs router.apply_scale_to_output=True, got False",
        ),
        (
            {"routed_scaling_factor": 2.5},
            {"apply_router_weight_on_input": True, "top_k": 1},
            "apply_router_weight_on_input needs router.apply_scale_to_output=True .* got False with factor 2.5",
        ),
        (
            {"routed_scaling_factor": 6.0, "apply_scale_to_output": True, "num_zero_experts": 2},
            {},
            "num_zero_experts needs router.apply_scale_to_output=False .* got True with factor 6.0",
        ),
    ],
)
def test_a_scaling_factor_that_would_be_missed_or_applied_twice_is_refused(router, changes, message):
    with pytest.raises(ValueError, match=message):
        layer(RouterConfig(**router), **changes)


def test_scaling_that_reaches_the_output_once_is_legal():
    on_output = RouterConfig(routed_scaling_factor=2.5, apply_scale_to_output=True)
    assert layer(on_output, inverse_scale_shared_in_float16=True).inverse_scale_shared_in_float16
    assert layer(on_output, apply_router_weight_on_input=True, top_k=1).apply_router_weight_on_input
    assert layer(RouterConfig(routed_scaling_factor=6.0, num_zero_experts=2)).router.num_zero_experts == 2


@pytest.mark.parametrize("name", ["intermediate_size", "hidden_size"])
def test_shared_experts_need_positive_sizes(name):
    with pytest.raises(ValueError, match=f"{name} of the shared experts must be positive.*, got 0"):
        SharedExpertsConfig(**{"intermediate_size": 4, name: 0})


def test_sizes_may_be_integers_of_numpy():
    assert layer(hidden_size=np.int64(16), top_k=np.int32(2)) == layer()


@pytest.mark.parametrize("axis", [["expert"], ("expert", None), 0], ids=str)
def test_mesh_axes_are_names(axis):
    # A list would be accepted, and make every configuration that holds it unhashable.
    with pytest.raises(ValueError, match="expert_axis must be the name of a mesh axis, a tuple of names, or None; got"):
        ParallelConfig(expert_axis=axis)


CONFIGS = {
    RouterConfig: {},
    SharedExpertsConfig: {"intermediate_size": 4},
    ParallelConfig: {},
    MoEConfig: {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "top_k": 2},
}
SWITCHES = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config) if field.type is bool]


@pytest.mark.parametrize(("config", "name"), SWITCHES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", ["false", 0, None], ids=repr)
def test_what_merely_counts_as_true_or_false_is_no_switch(config, name, value):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
        config(**CONFIGS[config] | {name: value})


def test_all_switches_are_known_as_such():
    names = {name for _, name in SWITCHES}
    assert names >= {"renormalize", "correction_bias", "sigmoid_gate", "expert_bias", "reduce_results"}


def test_switches_may_be_booleans_of_numpy():
    assert RouterConfig(renormalize=np.False_) == RouterConfig(renormalize=False)


def test_values_of_the_correction_bias_are_told_where_they_belong():
    with pytest.raises(ValueError, match=r"got \[9.0, 0.0\]; .* the values go into layer.router.correction_bias"):
        RouterConfig(scoring="sigmoid", correction_bias=[9.0, 0.0])


def test_switches_of_vllm_are_checked_too():
    with pytest.raises(ValueError, match="enable_ep must be True or False, got 'no'"):
        ParallelConfig.from_vllm(tp=2, enable_ep="no")


@pytest.mark.parametrize(("value", "message"), [(3, "be 1 or 2, got 3"), (2.0, "be an integer, got 2.0")])
def test_micro_batches_are_one_or_two(value, message):
    with pytest.raises(ValueError, match=f"micro_batches must {message}"):
        ParallelConfig(micro_batches=value)


def test_nothing_is_sharded_unless_asked_for():
    config = ParallelConfig()
    assert (config.expert_axis, config.tensor_axis, config.data_axis, config.sequence_axis) == (None,) * 4
