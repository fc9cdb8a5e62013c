"""A value of `config.json` that has a wrong type is refused by name, before anything computes with it."""

import dataclasses
import re

import pytest
from support.published_configs import CONFIGS

from moe_jax.families import FAMILIES, get_family
from moe_jax.families.config_keys import ONLY_DECODERS
from moe_jax.families.config_types import CONFIG_TYPES, ROPE_PARAMETER_TYPES
from moe_jax.families.rope import ROPE_KEYS, ROPE_TYPES
from moe_jax.families.settings import Key
from moe_jax.json_types import COUNT, POSITIVE_INTEGER

READ_BY_EVERY_DECODER = {"hidden_size", "num_hidden_layers", "hidden_act", "vocab_size", "max_position_embeddings"}


def build(model_type, **changes):
    config = {**CONFIGS[model_type], **changes}
    return get_family(config).build_decoder(config)


def keys_of(value):
    """Every spelling of every key in a family's row."""
    if isinstance(value, Key):
        return set(value.names) | keys_of(value.default) | keys_of(value.null)
    if isinstance(value, dict):
        return set().union(*map(keys_of, value.values()))
    if dataclasses.is_dataclass(value):
        return set().union(*(keys_of(getattr(value, field.name)) for field in dataclasses.fields(value)))
    return set()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_a_family_reads_has_a_type(model_type):
    family = FAMILIES[model_type]
    row = family.build_decoder
    read = keys_of(row) | keys_of(family.prediction_layers) | set(row.read) | set(row.refused)
    read |= set(ROPE_KEYS) | READ_BY_EVERY_DECODER
    assert read <= CONFIG_TYPES.keys() | ONLY_DECODERS.keys()


def test_every_rotary_parameter_has_a_type():
    assert set().union(*ROPE_TYPES.values()) == ROPE_PARAMETER_TYPES.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a positive finite number, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive finite number, got nan"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number above 1, got 10000"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
            "factor must be a positive finite number, got 1000",
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive finite number, got 0"),
        ({"router_aux_loss_coef": "x", "hidden_size": 2048.0}, "hidden_size must be a positive integer, got 2048.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer of at most 100,000, got True"),
        # Layers and experts are listed one by one: so many would take all memory.
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be a positive integer of at most 100,000, got 1000"),
        ({"num_experts": 100_001}, "num_experts must be a positive integer of at most 100,000, got 100001"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"mlp_only_layers": "3"}, "mlp_only_layers must be a list of integers, got '3'"),
        ({"hidden_act": 1}, "hidden_act must be a string, got 1"),
        ({"rope_parameters": "x"}, "rope_parameters must be an object, got 'x'"),
        ({"rope_scaling": []}, r"rope_scaling must be an object, got \[\]"),
        (
            {"rope_parameters": {"rope_theta": "1e6"}},
            "rope_parameters.rope_theta must be a finite number above 1, got '1e6'",
        ),
        ({"rope_theta": 1.0}, "rope_theta must be a finite number above 1, got 1.0"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 0}},
            "rope_scaling.factor must be a positive finite number, got 0",
        ),
        ({"rope_scaling": {"beta_fast": -1}}, "rope_scaling.beta_fast must be a finite number of at least 0, got -1"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type must be a string, got \['yarn'\]"),
        (
            {"hidden_size": "a", "vocab_size": "b"},
            "hidden_size must be a positive integer.*; vocab_size must be a positive integer",
        ),
        ({"vocab_size": "b", "hidden_size": None}, "vocab_size must be a positive integer, got 'b'"),
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_with_its_key_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        build("qwen3_moe", **changes)


SIZES = sorted(
    name for config in CONFIGS.values() for name in config if CONFIG_TYPES.get(name) in (POSITIVE_INTEGER, COUNT)
)


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", sorted(set(SIZES)))
def test_a_size_that_is_not_positive_is_refused_with_file_and_key(name, size):
    for model_type in CONFIGS:
        if name in CONFIGS[model_type]:
            with pytest.raises(ValueError, match=rf"^config\.json: {name} must be a positive integer.*, got {size}"):
                build(model_type, **{name: size})


@pytest.mark.parametrize("model_type", CONFIGS)
def test_whatever_is_missing_or_null_a_family_answers_with_a_decoder_or_with_file_and_key(model_type):
    for name in CONFIGS[model_type]:
        config = {key: value for key, value in CONFIGS[model_type].items() if key != name}
        for changed in (config, {**config, name: None}):
            try:
                FAMILIES[model_type].build_decoder(changed)
            except ValueError as error:
                assert re.match(rf"config\.json.*\b{name}\b", str(error))  # noqa: PT017 - most keys may be missing


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads=32, got 5"),
        (
            "mixtral",
            {"num_attention_heads": 10000, "num_key_value_heads": 1},
            "head_dim .* of 0 with .* rotates 0 dimensions",
        ),
        ("mixtral", {"sliding_window": 0}, "sliding_window must be at least 1, or null for none; got 0"),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 rotates 192 dimensions"),
        ("glm4_moe", {"partial_rotary_factor": 0.001}, "partial_rotary_factor=0.001 rotates 0 dimensions"),
        (
            "deepseek_v3",
            {"qk_rope_head_dim": 63},
            "qk_rope_head_dim .* of 63 with .* rotates 63 dimensions; it must be an even number",
        ),
        ("deepseek_v3", {"n_group": 7}, "n_routed_experts=256, num_experts_per_tok=8 .*: num_groups must divide"),
    ],
    ids=str,
)
def test_sizes_that_do_not_go_together_are_refused(model_type, changes, message):
    with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
        build(model_type, **changes)


@pytest.mark.parametrize("model_type", [["qwen3_moe"], 3, None])
def test_a_model_type_that_is_no_string_is_unknown(model_type):
    with pytest.raises(ValueError, match="is not supported; known:"):
        get_family({"model_type": model_type})


def test_an_integer_is_a_number():
    assert build("qwen3_moe", rope_theta=10**6) == build("qwen3_moe", rope_theta=1e6)
