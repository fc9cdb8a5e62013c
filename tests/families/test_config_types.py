"""A value of `config.json` that has a wrong type is refused by name, before anything computes with it."""

import dataclasses

import pytest
from published_configs import CONFIGS

from moe_jax.families import FAMILIES, get_family
from moe_jax.families.config_keys import ONLY_DECODERS
from moe_jax.families.config_types import CONFIG_TYPES, ROPE_PARAMETER_TYPES
from moe_jax.families.rope import ROPE_KEYS, ROPE_TYPES
from moe_jax.families.settings import Key

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
    row = FAMILIES[model_type].build_decoder
    read = keys_of(row) | set(row.read) | set(row.refused) | set(ROPE_KEYS) | READ_BY_EVERY_DECODER
    assert read <= CONFIG_TYPES.keys() | ONLY_DECODERS.keys()


def test_every_rotary_parameter_has_a_type():
    assert set().union(*ROPE_TYPES.values()) == ROPE_PARAMETER_TYPES.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got nan"),
        ({"hidden_size": 2048.0}, "hidden_size must be an integer, got 2048.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, got True"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"mlp_only_layers": "3"}, "mlp_only_layers must be a list of integers, got '3'"),
        ({"hidden_act": 1}, "hidden_act must be a string, got 1"),
        ({"rope_parameters": "x"}, "rope_parameters must be an object, got 'x'"),
        ({"rope_scaling": []}, r"rope_scaling must be an object, got \[\]"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta must be a finite number, got '1e6'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type must be a string, got \['yarn'\]"),
        ({"hidden_size": "a", "vocab_size": "b"}, "hidden_size must be an integer.*; vocab_size must be an integer"),
        ({"vocab_size": "b", "hidden_size": None}, "vocab_size must be an integer, got 'b'"),
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_with_its_key_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        build("qwen3_moe", **changes)


@pytest.mark.parametrize("model_type", [["qwen3_moe"], 3, None])
def test_a_model_type_that_is_no_string_is_unknown(model_type):
    with pytest.raises(ValueError, match="is not supported; known:"):
        get_family({"model_type": model_type})


def test_an_integer_is_a_number():
    assert build("qwen3_moe", rope_theta=10**6) == build("qwen3_moe", rope_theta=1e6)
