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


ASSUMED = [
    # family, key, what transformers' configuration class gives it, another value, settings under which it counts
    *((name, "tie_word_embeddings", False, True, {}) for name in FAMILIES),
    *((name, "hidden_act", "silu", "gelu", {}) for name in FAMILIES if name != "gpt_oss"),
    *(
        (name, "attention_bias", False, True, {})
        for name in FAMILIES
        if name not in ("mixtral", "qwen2_moe", "gpt_oss")
    ),
    *((name, "norm_topk_prob", False, True, {}) for name in ("qwen2_moe", "qwen3_moe", "olmoe")),
    *((name, "norm_topk_prob", True, False, {}) for name in ("deepseek_v3", "kimi_k2", "glm4_moe")),
    *((name, "rope_theta", 1e4, 5e5, {}) for name in FAMILIES if name not in ("mixtral", "gpt_oss")),
    *((name, "sliding_window", 4096, 7, {"use_sliding_window": True}) for name in ("qwen2_moe", "qwen3_moe")),
    *((name, "use_sliding_window", False, True, {"sliding_window": 7}) for name in ("qwen2_moe", "qwen3_moe")),
    *((name, "decoder_sparse_step", 1, 2, {}) for name in ("qwen2_moe", "qwen3_moe")),
    *((name, "mlp_only_layers", [], [0], {}) for name in ("qwen2_moe", "qwen3_moe")),
    ("mixtral", "rope_theta", 1e6, 1e4, {}),
    ("mixtral", "sliding_window", None, 7, {}),
    ("qwen2_moe", "qkv_bias", True, False, {}),
    ("qwen2_moe", "max_window_layers", 28, 26, {"use_sliding_window": True, "num_hidden_layers": 32}),
    ("olmoe", "clip_qkv", None, 8.0, {}),
    ("deepseek_v2", "mlp_bias", False, True, {}),
    ("deepseek_v2", "topk_method", "greedy", "group_limited_greedy", {"n_group": 8, "topk_group": 3}),
    *((name, "rope_interleave", True, False, {}) for name in ("deepseek_v3", "kimi_k2")),
    ("glm4_moe", "use_qk_norm", False, True, {}),
    ("glm4_moe", "partial_rotary_factor", 0.5, 0.25, {}),
    ("gpt_oss", "attention_bias", True, False, {}),
    ("gpt_oss", "sliding_window", 128, None, {}),
    ("gpt_oss", "swiglu_limit", 7.0, 5.0, {}),
    ("gpt_oss", "swiglu_alpha", 1.702, 1.5, {}),
    ("gpt_oss", "rope_theta", 150000.0, 1e4, {}),
]


@pytest.mark.parametrize(
    ("model_type", "key", "assumed", "other", "settings"), ASSUMED, ids=[f"{row[0]}-{row[1]}" for row in ASSUMED]
)
def test_what_a_config_leaves_out_is_what_transformers_assumes(model_type, key, assumed, other, settings):
    absent = build(model_type, **settings, **{key: ...})
    assert absent == build(model_type, **settings, **{key: assumed})
    assert absent != build(model_type, **settings, **{key: other})


def test_gpt_oss_is_stretched_as_published_without_being_told():
    assert build("gpt_oss", rope_scaling=..., rope_theta=...) == build("gpt_oss")


@pytest.mark.parametrize(
    ("model_type", "on_output"), [("qwen3_moe", True), ("olmoe", True), ("gpt_oss", True), ("glm4_moe", False)]
)
def test_attention_bias_switches_the_biases_that_the_family_has(model_type, on_output):
    for given in (True, False):
        attention = build(model_type, attention_bias=given).layers[0].attention
        assert (attention.qkv_bias, attention.output_bias) == (given, given and on_output)


def test_biases_of_mlps_are_those_of_dense_and_of_shared_ones():
    dense, *_, sparse = (layer.feed_forward for layer in build("deepseek_v2", mlp_bias=True).layers)
    assert dense.bias
    assert sparse.shared_experts.bias


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_after_routing_are_rounded_where_hugging_faces_model_does_it(model_type):
    router = build(model_type).layers[-1].feed_forward.router
    assert router.round_weights_to_input_dtype == (model_type in ("qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "glm4_moe"])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_groups_limit_the_choice_if_there_are_several(model_type, num_groups):
    limit = build(model_type, n_group=num_groups, topk_group=1).layers[-1].feed_forward.router.group_limit
    assert (limit is None) == (num_groups == 1)


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
    assert windows("qwen2_moe", **{**swa, "max_window_layers": 2}) == [7, None, None, None, None]
    listed = ["full_attention", *["sliding_attention"] * 23]
    assert windows("qwen2_moe", sliding_window=7, layer_types=listed) == [None] * 5
    assert windows("qwen2_moe", **swa, layer_types=listed) == [None, 7, 7, 7, 7]
    assert windows("gpt_oss", layer_types=...) == [128, None, 128, None, 128]
    assert windows("gpt_oss", layer_types=["full_attention"] * 24) == [None] * 5
    assert windows("gpt_oss", sliding_window=None) == [None] * 5


def test_sparse_layers_follow_step_and_exceptions():
    assert build("qwen3_moe", decoder_sparse_step=3, mlp_only_layers=[5, 8]).moe_layers[:4] == (2, 11, 14, 17)


def test_activations_come_under_hugging_face_names():
    ours = {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "relu2": "relu2",
    }  # fmt: skip
    for name, activation in ours.items():
        assert build("mixtral", hidden_act=name).layers[0].feed_forward.activation == activation
        dense, *_, sparse = (layer.feed_forward for layer in build("deepseek_v3", hidden_act=name).layers)
        assert (dense.activation, sparse.activation) == (activation, activation)
    activation = build("gpt_oss", swiglu_limit=5.0).layers[0].feed_forward.activation
    assert (activation.name, activation.limit, activation.alpha) == ("swigluoai", 5.0, 1.702)


def test_the_norms_have_the_epsilon_that_the_config_gives_and_those_of_latents_a_fixed_one():
    assert build("olmoe", rms_norm_eps=3e-4).norm_epsilon == 3e-4
    decoder = build("deepseek_v3", rms_norm_eps=3e-4)
    assert (decoder.norm_epsilon, decoder.layers[0].attention.norm_epsilon) == (3e-4, 1e-6)


def test_a_rank_of_queries_must_be_given_and_null_means_that_they_are_not_compressed():
    assert build("deepseek_v2", q_lora_rank=None).layers[0].attention.q_lora_rank is None
    with pytest.raises(ValueError, match=r"config\.json has no q_lora_rank"):
        build("deepseek_v2", q_lora_rank=...)


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
        with pytest.raises(ValueError, match=r"config\.json has no n_shared_experts"):
            build(model_type, n_shared_experts=...)


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
