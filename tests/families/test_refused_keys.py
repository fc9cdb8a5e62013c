"""A key of `config.json` that changes the result and isn't supported is refused by name; harmless ones are not."""

import pytest
from support.published_configs import CONFIGS

from moe_jax.families import FAMILIES, get_family

SETTINGS_OF_OTHER_MODELS = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "embedding_multiplier": 12.0,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "original_max_position_embeddings": 4096,
    "some_future_switch": 1,
}

REFUSED = [
    ("mixtral", {"router_jitter_noise": 0.1}),
    ("mixtral", {"attention_bias": True}),
    ("mixtral", {"layer_types": ["full_attention"] * 32}),
    ("mixtral", {"partial_rotary_factor": 0.5}),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 48}),
    ("qwen3_moe", {"shared_expert_intermediate_size": 128}),
    ("qwen3_moe", {"qkv_bias": True}),
    ("qwen3_moe", {"use_qk_norm": False}),
    ("qwen3_moe", {"pruned_heads": {"0": [1]}}),
    ("olmoe", {"sliding_window": 128}),
    ("olmoe", {"n_group": 2}),
    ("deepseek_v2", {"scoring_func": "sigmoid"}),
    ("deepseek_v2", {"topk_method": "noaux_tc"}),
    ("deepseek_v2", {"moe_layer_freq": 2}),
    ("deepseek_v2", {"rope_interleave": False}),
    ("deepseek_v2", {"num_key_value_heads": 2}),
    ("deepseek_v3", {"scoring_func": "softmax"}),
    ("deepseek_v3", {"topk_method": "greedy"}),
    ("deepseek_v3", {"moe_layer_freq": 2}),
    ("deepseek_v3", {"num_key_value_heads": 16}),
    ("deepseek_v3", {"sliding_window": 128}),
    ("deepseek_v3", {"mlp_bias": True}),
    ("glm4_moe", {"scoring_func": "softmax"}),
    ("glm4_moe", {"topk_method": "greedy"}),
    ("glm4_moe", {"sliding_window": 128}),
    ("gpt_oss", {"hidden_act": "gelu"}),
    ("gpt_oss", {"norm_topk_prob": False}),
    ("gpt_oss", {"partial_rotary_factor": 0.5}),
]


def build(model_type, **changes):
    config = {**CONFIGS[model_type], **changes}
    return get_family(config).build_decoder(config)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", SETTINGS_OF_OTHER_MODELS)
def test_a_setting_of_another_model_is_refused_by_name(model_type, key):
    with pytest.raises(ValueError, match=key):
        build(model_type, **{key: SETTINGS_OF_OTHER_MODELS[key]})


@pytest.mark.parametrize(("model_type", "changes"), REFUSED, ids=str)
def test_a_setting_that_this_family_does_not_have_is_refused_by_name(model_type, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        build(model_type, **changes)


def test_all_refused_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"router_jitter_noise=0.5 \(supported: 0.0\); mystery=3 \(unknown key\)"):
        build("mixtral", mystery=3, router_jitter_noise=0.5)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "gpt_oss"])
def test_an_unknown_activation_is_refused_with_the_known_ones(model_type):
    with pytest.raises(ValueError, match="hidden_act 'mish' is not supported; supported: silu, swish"):
        build(model_type, hidden_act="mish")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_an_unknown_rope_type_is_refused(model_type, spelling):
    changes = {"rope_scaling": None, spelling: {"rope_type": "longrope", "factor": 4.0}}
    with pytest.raises(ValueError, match="rope_type 'longrope' is not supported; supported: default, linear, yarn"):
        build(model_type, **changes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rope_parameters_that_would_be_ignored_are_refused(model_type):
    rope = {"rope_type": "yarn", "factor": 4.0, "mrope_section": [1, 2, 3]}
    with pytest.raises(ValueError, match="doesn't understand mrope_section"):
        build(model_type, rope_scaling=rope)
    with pytest.raises(ValueError, match="doesn't understand full_attention"):
        build(model_type, rope_scaling=None, rope_parameters={"full_attention": {"rope_type": "default"}})


def test_a_list_of_layer_types_must_fit_the_decoder():
    with pytest.raises(ValueError, match="layer_types must hold num_hidden_layers=24"):
        build("gpt_oss", layer_types=["full_attention"] * 23)
    with pytest.raises(ValueError, match="linear_attention"):
        build("gpt_oss", layer_types=["linear_attention"] * 24)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_harmless_and_null_settings_change_nothing(model_type):
    harmless = {"use_cache": False, "dtype": "float16", "output_router_logits": True, "some_future_switch": None}
    assert build(model_type, **harmless) == build(model_type)


# `PretrainedConfig` of transformers 4.40, with the values of its `to_dict()`.
FULL_DUMP = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
    "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False,
    "tie_encoder_decoder": False, "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False,
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "finetuning_task": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "num_labels": 2, "tokenizer_class": "LlamaTokenizer", "prefix": None,
    "bos_token_id": 1, "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None,
    "problem_type": None, "_name_or_path": "somewhere", "_commit_hash": "0123abcd", "_attn_implementation": "sdpa",
    "attn_implementation": "flash_attention_2", "unsloth_fixed": True, "unsloth_version": "2025.1",
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_full_dump_of_transformers_settings_changes_nothing(model_type):
    assert build(model_type, **FULL_DUMP) == build(model_type)


def test_impossible_routing_is_refused_with_the_file_and_its_keys():
    with pytest.raises(ValueError, match=r"^config\.json: .*num_experts_per_tok=9.*: top_k must be in"):
        build("mixtral", num_experts_per_tok=9)
    with pytest.raises(ValueError, match="num_groups must divide"):
        build("deepseek_v3", n_group=7)
