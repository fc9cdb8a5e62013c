"""Rotary settings are read from either spelling, with Hugging Face's precedence and defaults."""

import math

import pytest

from moe_jax.families.decoder import LinearScaling, YarnScaling
from moe_jax.families.rope import RopeRow, latent_attention_scale, read_rope

YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


PLAIN = RopeRow()


def read(config, row=PLAIN, head_dim=64):
    return read_rope({"max_position_embeddings": 8192, **config}, row, head_dim=head_dim)


def test_theta_comes_from_the_parameters_then_from_the_config_then_from_the_family():
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 7.0}
    assert read(inside).theta == 5.0
    assert read({"rope_theta": 7.0}).theta == 7.0
    assert read({}, RopeRow(theta=9.0)).theta == 9.0


def test_both_spellings_of_the_type_are_read():
    for name in ("type", "rope_type"):
        assert read({"rope_scaling": {name: "linear", "factor": 4}}).scaling == LinearScaling(factor=4.0)


def test_the_older_spelling_goes_before_todays():
    config = {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "default"}}
    assert read(config).scaling == LinearScaling(factor=4.0)
    assert read({**config, "rope_scaling": None}).scaling is None


def test_null_parameters_count_as_absent():
    config = {"rope_parameters": {"rope_type": None, "rope_theta": None, "factor": None}, "rope_theta": 7.0}
    assert read(config) == read({"rope_theta": 7.0})


def test_a_family_may_rotate_part_of_a_head():
    half = RopeRow(rotary_fraction=0.5)
    assert read({}, half).rotary_dim == 32
    assert read({"partial_rotary_factor": 0.25}, half).rotary_dim == 16
    assert read({"rope_parameters": {"partial_rotary_factor": 0.75}}, half).rotary_dim == 48


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, 0.1 * math.log(40) + 1),
        ({"mscale": 0.707}, 0.1 * math.log(40) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.7}, (0.1 * math.log(40) + 1) / (0.07 * math.log(40) + 1)),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.7}, 1.5),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"factor": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7}, 1.0),
    ],
    ids=str,
)
def test_the_attention_factor_of_yarn(extra, expected):
    assert read({"rope_scaling": YARN | extra}).scaling.attention_factor == pytest.approx(expected, rel=1e-12)


def test_yarn_works_out_what_the_config_leaves_out():
    scaling = read({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": None}}).scaling
    assert scaling == YarnScaling(
        factor=2.0, original_max_positions=8192, beta_fast=32.0, attention_factor=0.1 * math.log(2) + 1
    )
    assert read({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1024}}).scaling.factor == 8.0
    borders = read({"rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}).scaling
    assert (borders.beta_fast, borders.beta_slow) == (16.0, 2.0)


def test_linear_scaling_needs_a_factor():
    with pytest.raises(ValueError, match="rope_type 'linear' needs a factor"):
        read({"rope_scaling": {"rope_type": "linear"}})


def test_latent_attention_is_scaled_by_the_temperature_squared():
    config = {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 163840}
    scale = latent_attention_scale(config, RopeRow(), head_dim=192)
    assert scale == pytest.approx(0.1352337788608801, rel=1e-9)  # 192 ** -0.5 * (0.1 ln 40 + 1) ** 2
    assert latent_attention_scale({}, RopeRow(), head_dim=192) == 192**-0.5
    linear = {"rope_scaling": {"type": "linear", "factor": 40.0, "mscale_all_dim": 1.0}}
    assert latent_attention_scale(linear, RopeRow(), head_dim=192) == pytest.approx(0.1352337788608801, rel=1e-9)
