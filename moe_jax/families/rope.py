"""Rotary settings of a `config.json`: today's `rope_parameters`, or the older `rope_theta` with `rope_scaling`."""

import math
from typing import Any

from moe_jax.families.decoder import LinearScaling, Rope, YarnScaling
from moe_jax.families.settings import HFConfig

ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_interleave")
ROPE_TYPES = ("default", "linear", "yarn")


def rope_parameters(config: HFConfig) -> dict[str, Any]:
    """The rotary parameters in today's spelling, whichever spelling the file has."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters["rope_type"] = parameters.pop("type", None) or parameters.get("rope_type") or "default"
    if parameters.get("rope_theta") is None and config.get("rope_theta") is not None:
        parameters["rope_theta"] = config["rope_theta"]
    return parameters


def read_rope(config: HFConfig, *, rotary_dim: int, default_theta: float, interleaved: bool = False) -> Rope:
    """The rotary embedding of one attention kind; ValueError for a `rope_type` that isn't supported."""
    parameters = rope_parameters(config)
    kind = parameters["rope_type"]
    scaling: LinearScaling | YarnScaling | None
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(factor=parameters["factor"])
    elif kind == "yarn":
        scaling = _yarn(parameters, config)
    else:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    theta = parameters.get("rope_theta")
    return Rope(
        theta=float(default_theta if theta is None else theta),
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        scaling=scaling,
    )


def _yarn(parameters: dict[str, Any], config: HFConfig) -> YarnScaling:
    original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = float(parameters["factor"])
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        truncate=parameters.get("truncate", True),
        attention_factor=_yarn_attention_factor(parameters, factor),
    )


def _yarn_attention_factor(parameters: dict[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 · mscale · ln(factor) + 1, or 1 when sequences aren't stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
