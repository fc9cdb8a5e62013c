"""What `generation_config.json` means, and what is refused."""

import json
import re

import pytest

from moe_jax.generation import GenerationSettings, read_generation_settings, settings_from_hf


def test_a_checkpoint_without_generation_config_is_greedy_and_ends_as_its_config_says():
    assert settings_from_hf({}, {"eos_token_id": 2}) == GenerationSettings(eos_token_ids=(2,), pad_token_id=2)
    assert settings_from_hf({}, {"eos_token_id": None}) == GenerationSettings()
    assert settings_from_hf({}, {"eos_token_id": [7, 2]}).pad_token_id == 7  # the first, as in transformers


def test_every_supported_setting_is_read():
    generation_config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "max_new_tokens": 77,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "transformers_version": "4.51.0",
    }
    assert settings_from_hf(generation_config, {"eos_token_id": 1}) == GenerationSettings(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        repetition_penalty=1.05,
        default_new_tokens=77,
        eos_token_ids=(151645, 151643),
        pad_token_id=151643,
    )


def test_the_callers_settings_win_and_none_means_the_checkpoints():
    settings = settings_from_hf(
        {"do_sample": True, "top_k": 20, "top_p": 0.5}, {}, top_p=0.7, top_k=None, max_new_tokens=3
    )
    assert (settings.top_p, settings.top_k, settings.max_new_tokens) == (0.7, 20, 3)
    assert settings_from_hf({"do_sample": True}, {}, do_sample=False).do_sample is False
    assert settings_from_hf({"eos_token_id": 3, "pad_token_id": 4}, {"eos_token_id": 2}, eos_token_ids=(5,)) == (
        GenerationSettings(eos_token_ids=(5,), pad_token_id=4)
    )


BAD_FOR_SAMPLING = [{"top_p": 7}, {"top_p": "x"}, {"temperature": -1}, {"top_k": -3}, {"top_k": 2.5}]


@pytest.mark.parametrize("bad", BAD_FOR_SAMPLING, ids=str)
def test_what_has_no_effect_is_not_looked_at(bad):
    assert settings_from_hf(bad, {}) == GenerationSettings()
    assert settings_from_hf({"do_sample": True, **bad}, {}, do_sample=False) == GenerationSettings()
    (name,) = bad
    settings = settings_from_hf({"do_sample": True, **bad}, {}, **{name: 1})
    assert getattr(settings, name) == 1
    with pytest.raises(ValueError, match=rf"^generation_config\.json: {name} must be"):
        settings_from_hf({"do_sample": True, **bad}, {})


@pytest.mark.parametrize(
    ("file", "config", "message"),
    [
        ({"repetition_penalty": 0}, {}, r"^generation_config\.json: repetition_penalty must be positive"),
        ({"eos_token_id": -1}, {}, r"^generation_config\.json: eos_token_ids must be integers from 0"),
        ({}, {"eos_token_id": [1, 2**31]}, r"^config\.json: eos_token_ids must be integers from 0"),
        ({}, {"pad_token_id": 2**31}, r"^config\.json: pad_token_id must be an integer from"),
        ({"max_new_tokens": 0}, {}, r"^generation_config\.json: max_new_tokens must be a positive integer, got 0"),
    ],
    ids=str,
)
def test_an_illegal_value_names_the_file_that_it_comes_from(file, config, message):
    with pytest.raises(ValueError, match=message):
        settings_from_hf(file, config)


def test_the_callers_own_illegal_value_names_no_file():
    with pytest.raises(ValueError, match=r"^top_p must be in"):
        settings_from_hf({"do_sample": True, "top_p": 0.5}, {}, top_p=3.0)


@pytest.mark.parametrize("generation_config", [{}, {"do_sample": True, "temperature": 0}], ids=str)
def test_the_callers_restrictions_of_sampling_are_refused_where_nothing_is_drawn(generation_config):
    with pytest.raises(ValueError, match="top_k, top_p would have no effect.*do_sample=True"):
        settings_from_hf(generation_config, {}, top_k=3, top_p=0.5)
    assert settings_from_hf(generation_config, {}, top_k=3, do_sample=True).top_k == 3


@pytest.mark.parametrize(
    ("generation_config", "field", "value"),
    [
        ({"top_k": 0}, "top_k", None),
        ({"do_sample": True, "top_k": 0}, "top_k", None),
        ({"do_sample": True, "temperature": 0}, "do_sample", False),
    ],
)
def test_customary_ways_to_switch_a_setting_off_are_understood(generation_config, field, value):
    assert getattr(settings_from_hf(generation_config, {}), field) == value


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_beams", 4),
        ("encoder_repetition_penalty", 1.05),
        ("num_beam_groups", 2),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("no_repeat_ngram_size", 3),
        ("encoder_no_repeat_ngram_size", 3),
        ("min_length", 5),
        ("exponential_decay_length_penalty", [5, 1.5]),
        ("force_words_ids", [[7]]),
        ("constraints", [{}]),
        ("sequence_bias", [[[7], -10.0]]),
        ("begin_suppress_tokens", [5]),
        ("forced_bos_token_id", 2),
        ("forced_decoder_ids", [[1, 5]]),
        ("watermarking_config", {"bias": 2.5}),
        ("max_time", 1.5),
        ("suppress_tokens", [5]),
        ("bad_words_ids", [[7]]),
        ("min_new_tokens", 2),
        ("forced_eos_token_id", 2),
        ("guidance_scale", 1.5),
        ("stop_strings", ["###"]),
        ("token_healing", True),
    ],
)
def test_a_setting_that_would_change_the_result_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=rf"{setting}.*--ignore-generation-config \(ignore_generation_config=True\)$"):
        settings_from_hf({setting: value}, {})


def test_neutral_values_of_unsupported_settings_are_accepted():
    settings_from_hf({"num_beams": 1, "repetition_penalty": 1.0, "suppress_tokens": None, "bad_words_ids": []}, {})
    settings_from_hf({"token_healing": False}, {})


def test_settings_of_sampling_matter_only_when_sampling():
    settings_from_hf({"min_p": 0.1, "typical_p": 0.9}, {})
    with pytest.raises(ValueError, match=r"min_p=0\.1, typical_p=0\.9"):
        settings_from_hf({"min_p": 0.1, "typical_p": 0.9, "do_sample": True}, {})
    settings_from_hf({"min_p": 0.1, "do_sample": True}, {}, do_sample=False)
    for name, value in (("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1), ("top_h", 0.5)):
        settings_from_hf({name: value}, {})
        with pytest.raises(ValueError, match=f"{name}={value}"):
            settings_from_hf({name: value, "do_sample": True}, {})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("default_new_tokens", 0, "default_new_tokens must be at least 1, got 0"),
        ("temperature", -1.0, "temperature must be positive and finite, got -1.0"),
        ("temperature", float("nan"), "got nan"),
        ("temperature", float("inf"), "got inf"),
        ("top_k", -3, "top_k must be at least 1.*got -3"),
        ("repetition_penalty", 0.0, "repetition_penalty must be positive and finite, got 0.0"),
        ("repetition_penalty", float("nan"), "got nan"),
        ("top_p", 1.2, r"top_p must be in \(0, 1\].*got 1.2"),
        ("top_p", 0.0, "got 0.0"),
        ("top_p", float("nan"), "got nan"),
        ("eos_token_ids", (-1,), r"must be integers from 0 to 2\^31 - 1, got \(-1,\)"),
        ("eos_token_ids", (2**31,), "must be integers from 0"),
        ("eos_token_ids", (2.0,), "must be integers from 0"),
        ("eos_token_ids", 2, "eos_token_ids must be tuple or list, got 2"),
        ("pad_token_id", 2**31, r"must be an integer from -2\^31"),
        ("pad_token_id", None, "pad_token_id must be an integer .*got None"),
        ("do_sample", "no", "do_sample must be True or False, got 'no'"),
        ("max_new_tokens", 4.5, "max_new_tokens must be an integer, got 4.5"),
        ("top_k", 2.5, "top_k must be an integer, got 2.5"),
        ("temperature", "1", "temperature must be positive and finite, got '1'"),
        ("top_p", "0.5", r"top_p must be in \(0, 1\].*got '0.5'"),
        ("repetition_penalty", None, "repetition_penalty must be positive and finite, got None"),
    ],
)
def test_illegal_values_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**{field: value})


@pytest.mark.parametrize(
    ("setting", "value", "meaning"),
    [
        ("temperature", "0.7", "a finite number"),
        ("top_p", [0.5], "a finite number"),
        ("repetition_penalty", "1.05", "a finite number"),
        ("top_k", 20.5, "an integer"),
        ("max_new_tokens", "5", "a positive integer"),
        ("max_new_tokens", True, "a positive integer"),
        ("do_sample", "true", "true or false"),
        ("do_sample", 1, "true or false"),
        ("eos_token_id", "0", "an integer or a list of integers"),
        ("eos_token_id", [0, "1"], "an integer or a list of integers"),
        ("pad_token_id", {}, "an integer"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_file_and_key(setting, value, meaning):
    message = re.escape(f"{setting} must be {meaning}, got {value!r}")
    with pytest.raises(ValueError, match=rf"^generation_config\.json: {message}$"):
        settings_from_hf({"do_sample": True, setting: value}, {})
    if setting.endswith("token_id"):
        with pytest.raises(ValueError, match=rf"^config\.json: {message}$"):
            settings_from_hf({}, {setting: value})
        settings_from_hf({setting: 7}, {setting: value})  # what is not used may be anything


def test_settings_are_read_from_a_checkpoint_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9, "pad_token_id": 4}))
    assert read_generation_settings(tmp_path).eos_token_ids == (9,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": True}))
    settings = read_generation_settings(tmp_path, max_new_tokens=5)
    assert settings == GenerationSettings(do_sample=True, eos_token_ids=(1, 2), pad_token_id=4, max_new_tokens=5)


@pytest.mark.parametrize("content", ['{"num_beams": 4, "eos_token_id": 1}', '{"top_p": "x"}', "{not json"])
def test_a_generation_config_can_be_left_aside(tmp_path, content):
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    (tmp_path / "generation_config.json").write_text(content)
    settings = read_generation_settings(tmp_path, ignore_generation_config=True, max_new_tokens=3)
    assert settings == GenerationSettings(eos_token_ids=(9,), pad_token_id=9, max_new_tokens=3)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"generation_config\.json: is not valid JSON"):
        read_generation_settings(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_generation_settings(tmp_path)
