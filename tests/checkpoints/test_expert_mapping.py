"""Expert parameter mapping: spec 4.1 and 4.2."""

import itertools

import pytest
from flax import nnx

from moe_jax.checkpoints import fused_moe_make_expert_params_mapping, make_expert_params_mapping

EXAMPLE_OF_SPEC_4_2 = [
    ("experts.w13_", "experts.0.gate_proj.", 0, "w1"),
    ("experts.w2_", "experts.0.down_proj.", 0, "w2"),
    ("experts.w13_", "experts.0.up_proj.", 0, "w3"),
    ("experts.w13_", "experts.1.gate_proj.", 1, "w1"),
    ("experts.w2_", "experts.1.down_proj.", 1, "w2"),
    ("experts.w13_", "experts.1.up_proj.", 1, "w3"),
]


def test_pr_40671_module_level_mapping_gives_the_rows_of_the_spec():
    rows = fused_moe_make_expert_params_mapping(None, "gate_proj", "down_proj", "up_proj", num_experts=2)
    assert rows == EXAMPLE_OF_SPEC_4_2


def test_pr_40671_arguments_may_be_positional_up_to_the_redundant_experts():
    rows = fused_moe_make_expert_params_mapping(None, "gate_proj", "down_proj", "up_proj", 2, 1)
    assert rows[:6] == EXAMPLE_OF_SPEC_4_2
    assert rows[6:] == [
        ("experts.w13_", "experts.0.gate_proj.", 2, "w1"),
        ("experts.w2_", "experts.0.down_proj.", 2, "w2"),
        ("experts.w13_", "experts.0.up_proj.", 2, "w3"),
    ]


def test_mixtral_names_map_w1_and_w3_to_w13():
    rows = fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", num_experts=1)
    assert rows == [
        ("experts.w13_", "experts.0.w1.", 0, "w1"),
        ("experts.w2_", "experts.0.w2.", 0, "w2"),
        ("experts.w13_", "experts.0.w3.", 0, "w3"),
    ]


def test_llama4_fused_mapping_names_the_same_tensor_for_gate_and_up():
    rows = fused_moe_make_expert_params_mapping(None, "gate_up_proj", "down_proj", "gate_up_proj", 1)
    assert rows == [
        ("experts.w13_", "experts.0.gate_up_proj.", 0, "w1"),
        ("experts.w2_", "experts.0.down_proj.", 0, "w2"),
        ("experts.w13_", "experts.0.gate_up_proj.", 0, "w3"),
    ]


def test_experts_without_a_gate_keep_upstreams_row_with_the_empty_name():
    rows = fused_moe_make_expert_params_mapping(None, "up_proj", "down_proj", "", 1)
    assert rows == [
        ("experts.w13_", "experts.0.up_proj.", 0, "w1"),
        ("experts.w2_", "experts.0.down_proj.", 0, "w2"),
        ("experts.w13_", "experts.0..", 0, "w3"),
    ]


def test_routed_experts_prefix_stands_in_the_parameter_name_only():
    rows = fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", 1, routed_experts_prefix="routed_experts")
    assert rows[:2] == [
        ("experts.routed_experts.w13_", "experts.0.w1.", 0, "w1"),
        ("experts.routed_experts.w2_", "experts.0.w2.", 0, "w2"),
    ]


class TorchLikeModel:
    def __init__(self, *names):
        self.names = names

    def named_parameters(self):
        return ((name, None) for name in self.names)


class BaseLayer(nnx.Module):
    def __init__(self):
        self.base_layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


class WrappedModel(nnx.Module):
    def __init__(self):
        self.experts = BaseLayer()


@pytest.mark.parametrize(
    "model", [TorchLikeModel("layers.0.experts.base_layer.w13_weight"), WrappedModel()], ids=["named_parameters", "nnx"]
)
def test_lora_wrapped_models_get_base_layer_in_both_names(model):
    rows = fused_moe_make_expert_params_mapping(model, "w1", "w2", "w3", 1)
    assert rows[0] == ("experts.base_layer.w13_", "experts.0.w1.base_layer.", 0, "w1")
    assert rows[1] == ("experts.base_layer.w2_", "experts.0.w2.base_layer.", 0, "w2")
    both = fused_moe_make_expert_params_mapping(model, "w1", "w2", "w3", 1, routed_experts_prefix="routed_experts")
    assert both[0] == ("experts.routed_experts.base_layer.w13_", "experts.0.w1.base_layer.", 0, "w1")


@pytest.mark.parametrize("model", [TorchLikeModel("experts.w13_weight"), nnx.Linear(2, 2, rngs=nnx.Rngs(0))], ids=type)
def test_ordinary_models_get_no_base_layer(model):
    assert fused_moe_make_expert_params_mapping(model, "w1", "w2", "w3", 1)[0][0] == "experts.w13_"


@pytest.mark.parametrize(("num_experts", "redundant"), list(itertools.product([1, 3, 9], [0, 2, 10])))
def test_there_are_three_rows_per_physical_expert_and_redundant_ones_repeat_the_logical_ones(num_experts, redundant):
    rows = fused_moe_make_expert_params_mapping(None, "gate", "down", "up", num_experts, redundant)
    assert len(rows) == 3 * (num_experts + redundant)
    assert [row[2] for row in rows[::3]] == list(range(num_experts + redundant))
    logical = [*range(num_experts), *(i % num_experts for i in range(redundant))]
    assert [row[1] for row in rows[1::3]] == [f"experts.{expert}.down." for expert in logical]


def test_our_mapping_has_upstreams_rows_with_our_parameter_names():
    theirs = fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", 3, 2)
    ours = make_expert_params_mapping("w1", "w2", "w3", 3, 2)
    assert [row[1:] for row in ours] == [row[1:] for row in theirs]
    names = {"experts.w13_": "routed_experts.gate_up_", "experts.w2_": "routed_experts.down_"}
    assert [row[0] for row in ours] == [names[row[0]] for row in theirs]


def test_our_mapping_has_nothing_to_read_for_an_absent_up_projection():
    assert [row[3] for row in make_expert_params_mapping("up_proj", "down_proj", "", 2)] == ["w1", "w2"] * 2


@pytest.mark.parametrize("arguments", [(0,), (-1,), (2, -1)])
def test_impossible_numbers_of_experts_are_refused(arguments):
    with pytest.raises(ValueError, match=r"num_(redundant_)?experts must (be positive|not be negative), got"):
        fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", *arguments)
