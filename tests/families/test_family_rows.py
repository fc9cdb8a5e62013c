"""Every family row reads published and golden configurations, and names every parameter of what it builds."""

import math

import pytest
from support import golden_cases
from support.published_configs import ANNOUNCED, CONFIGS, PUBLISHED

from moe_jax.config import GroupLimit
from moe_jax.families import FAMILIES, get_family, parameter_shapes
from moe_jax.families.decoder import DenseFeedForward


def build(model_type, **changes):
    config = {**CONFIGS[model_type], **changes}
    return get_family(config).build_decoder({name: value for name, value in config.items() if value is not ...})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(name):
    config, count = PUBLISHED[name]
    shapes = parameter_shapes(get_family(config).build_decoder(config))
    assert sum(math.prod(shape) for shape in shapes.values()) == count


@pytest.mark.parametrize("name", ANNOUNCED)
def test_a_published_config_is_read_and_has_about_as_many_parameters_as_announced(name):
    config, count = ANNOUNCED[name]
    shapes = parameter_shapes(get_family(config).build_decoder(config))
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(count, rel=0.015)


def test_kimi_k2_is_deepseek_v3_under_another_name():
    family, other = FAMILIES["kimi_k2"], FAMILIES["deepseek_v3"]
    config = CONFIGS["kimi_k2"]
    assert family.build_decoder(config) == other.build_decoder({**config, "model_type": "deepseek_v3"})
    assert family.names == other.names


@pytest.mark.parametrize("case", golden_cases.golden_cases(), ids=str)
def test_todays_and_published_spelling_of_a_config_give_the_same_decoder(case):
    family = get_family(case.config())
    assert family.build_decoder(case.config()) == family.build_decoder(case.hub_style_config())


def test_every_family_of_the_registry_is_covered_here():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_has_a_tensor_name_of_its_own(model_type):
    family = FAMILIES[model_type]
    paths = [path for path in parameter_shapes(build(model_type)) if ".routed_experts." not in path]
    names = []
    for path in paths:
        first, layer, *rest = path.split(".")
        template = ".".join([first, "{layer}", *rest]) if first == "layers" else path
        names.append(family.names[template].format(layer=layer))
    assert len(set(names)) == len(names)


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'llama' is not supported; known: deepseek_v2, .*qwen3_moe"):
        get_family({"model_type": "llama"})


def test_deepseek_v3_has_three_dense_layers_and_58_sparse_ones_with_groups():
    decoder = build("deepseek_v3")
    assert decoder.moe_layers == tuple(range(3, 61))
    assert decoder.layers[0].feed_forward == DenseFeedForward(intermediate_size=18432, activation="silu")
    router = decoder.layers[3].feed_forward.router
    assert router.scoring == "sigmoid"
    assert router.correction_bias
    assert router.renormalize
    assert router.renormalize_epsilon == 1e-20
    assert router.routed_scaling_factor == 2.5
    assert router.group_limit == GroupLimit(num_groups=8, groups_kept=4, score="top2_sum", masked_score=-math.inf)


def test_deepseek_v2_follows_hugging_face_and_not_vllm():
    router = build("deepseek_v2", norm_topk_prob=True).layers[1].feed_forward.router
    assert not router.renormalize  # Hugging Face's model does not read norm_topk_prob
    assert router.group_limit is None  # topk_method "greedy"
    grouped = build("deepseek_v2", topk_method="group_limited_greedy", n_group=8, topk_group=3)
    limit = grouped.layers[1].feed_forward.router.group_limit
    assert limit == GroupLimit(num_groups=8, groups_kept=3, score="max", masked_score=0.0)


def test_a_sliding_window_counts_only_where_the_family_says_so():
    def windows(*args, **changes):
        return [layer.attention.sliding_window for layer in build(*args, **changes).layers[:5]]

    assert windows("mixtral", sliding_window=7) == [7] * 5
    assert windows("qwen3_moe", sliding_window=7) == [None] * 5
    assert windows("qwen3_moe", sliding_window=7, use_sliding_window=True) == [7] * 5
    assert windows("qwen2_moe", sliding_window=7) == [None] * 5
    swa = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}
    assert windows("qwen2_moe", **swa) == [7, None, 7, None, None]
    listed = ["full_attention", *["sliding_attention"] * 23]
    assert windows("qwen2_moe", **swa, layer_types=listed) == [None, 7, 7, 7, 7]
    assert windows("gpt_oss", layer_types=...) == [128, None, 128, None, 128]
    assert windows("gpt_oss", layer_types=["full_attention"] * 24) == [None] * 5


def test_sparse_layers_follow_step_and_exceptions():
    assert build("qwen3_moe", decoder_sparse_step=3, mlp_only_layers=[5, 8]).moe_layers[:4] == (2, 11, 14, 17)


def test_activations_come_under_hugging_face_names():
    assert build("mixtral", hidden_act="gelu_pytorch_tanh").layers[0].feed_forward.activation == "gelu_tanh"
    assert build("mixtral", hidden_act="swish").layers[0].feed_forward.activation == "silu"
    activation = build("gpt_oss", swiglu_limit=5.0).layers[0].feed_forward.activation
    assert (activation.name, activation.limit, activation.alpha) == ("swigluoai", 5.0, 1.702)


def test_null_key_value_heads_mean_one_per_query_head_but_an_absent_key_is_an_error():
    assert build("olmoe", num_key_value_heads=None).layers[0].attention.num_kv_heads == 16
    with pytest.raises(ValueError, match=r"config\.json has no num_key_value_heads"):
        build("olmoe", num_key_value_heads=...)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "num_hidden_layers", "num_experts_per_tok"])
def test_a_missing_key_is_named(model_type, missing):
    with pytest.raises(ValueError, match=missing):
        build(model_type, **{missing: ...})


NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("spellings", [NUMBERS_OF_EXPERTS, EXPERTS_PER_TOKEN], ids=["experts", "per token"])
def test_all_spellings_of_a_number_of_experts_are_read(model_type, spellings):
    (published,) = (name for name in spellings if name in CONFIGS[model_type])
    for name in spellings:
        assert build(model_type, **{published: ..., name: CONFIGS[model_type][published]}) == build(model_type)


def test_spellings_may_agree_but_not_contradict_each_other():
    assert build("mixtral", num_experts=8) == build("mixtral")
    with pytest.raises(ValueError, match=r"config\.json: num_experts=4 and num_local_experts=8 contradict each other"):
        build("mixtral", num_experts=4)


def test_no_shared_experts_may_be_said_with_null_or_zero():
    for model_type in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        for none in (None, 0):
            assert build(model_type, n_shared_experts=none).layers[-1].feed_forward.shared_experts is None


QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("model_type", "changes", "positions"),
    [
        ("qwen3_moe", {}, 40960),
        ("qwen3_moe", {"rope_scaling": QWEN_YARN}, 131072),
        ("qwen3_moe", {"rope_parameters": {**QWEN_YARN, "rope_theta": 1e6}, "rope_scaling": None}, 131072),
        ("qwen3_moe", {"rope_scaling": QWEN_YARN, "max_position_embeddings": 262144}, 262144),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 163840),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.5}, "max_position_embeddings": 32769}, 81922),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 0.5}, "max_position_embeddings": 32768}, 32768),
        ("deepseek_v2", {}, 163840),
        ("deepseek_v3", {}, 163840),
        ("kimi_k2", {}, 131072),
        ("gpt_oss", {}, 131072),
        ("gpt_oss", {"rope_scaling": None}, 131072),
    ],
    ids=str,
)
def test_scaling_extends_the_positions_but_never_below_what_a_file_says_already(model_type, changes, positions):
    assert build(model_type, **changes).max_positions == positions
