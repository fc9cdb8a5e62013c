"""Rotary settings of a `config.json`: today's `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

Source: Hugging Face `modeling_rope_utils.py`, whose order of precedence is kept.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.families.config_types import ROPE_PARAMETER_TYPES
from moe_jax.families.decoder import LinearScaling, Rope, YarnScaling
from moe_jax.families.settings import HFConfig, key, resolve
from moe_jax.json_types import check_types

MAX_POSITIONS = key("max_position_embeddings")

ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
"""Keys of `config.json` that are read here."""

_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_YARN = frozenset(
    {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "attention_factor", "truncate",
    }
)  # fmt: skip
ROPE_TYPES: Mapping[str, frozenset[str]] = {
    "default": _COMMON,
    "linear": _COMMON | {"factor", "mscale_all_dim"},
    "yarn": _COMMON | _YARN,
}
"""Supported `rope_type` -> the parameters that it understands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeRow:
    """What a family assumes about its rotary embedding when `config.json` doesn't say."""

    theta: float = 10000.0
    """Base of the frequencies."""
    rotary_fraction: float | None = None
    """Share of a head's dimensions that is rotated; None: all of them, and `config.json` cannot change it."""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`rope_parameters` of a file that has none."""


def rope_parameters(config: HFConfig, row: RopeRow) -> dict[str, Any]:
    """The rotary parameters in today's spelling, whichever spelling the file has.

    Raises:
        ValueError: an unknown `rope_type`, parameters that its type doesn't understand, or values of a wrong type.
    """
    spelling = next((name for name in ("rope_scaling", "rope_parameters") if config.get(name)), None)
    given = row.parameters if spelling is None else config[spelling]
    check_types(given, ROPE_PARAMETER_TYPES, file="config.json", inside=spelling or "")
    parameters = {name: value for name, value in given.items() if value is not None}
    rope_type = parameters.pop("type", None)
    rope_type = parameters.setdefault("rope_type", rope_type or "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"config.json: rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    unknown = sorted(set(parameters) - ROPE_TYPES[rope_type])
    if unknown:
        raise ValueError(
            f"config.json: rope_type {rope_type!r} doesn't understand {', '.join(unknown)}; "
            f"it understands {', '.join(sorted(ROPE_TYPES[rope_type]))}"
        )
    for name, default in (("rope_theta", row.theta), ("partial_rotary_factor", row.rotary_fraction)):
        parameters.setdefault(name, default if config.get(name) is None else config[name])
    fraction = parameters["partial_rotary_factor"]
    if row.rotary_fraction is None and fraction not in (None, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor must be 1.0 for this family, got {fraction}")
    return parameters


def read_rope(config: HFConfig, row: RopeRow, *, head_dim: int, interleaved: bool = False) -> Rope:
    """The rotary embedding of one attention kind whose heads have `head_dim` dimensions to rotate."""
    parameters = rope_parameters(config, row)
    fraction = parameters["partial_rotary_factor"]
    rotary_dim = head_dim if fraction is None else int(head_dim * fraction)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"config.json: head_dim (qk_rope_head_dim in latent attention) of {head_dim} with "
            f"partial_rotary_factor={fraction} rotates {rotary_dim} dimensions; it must be an even number from 2 to {head_dim}"
        )
    return Rope(
        theta=float(parameters["rope_theta"]),
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        scaling=_scaling(parameters, config),
    )


def max_positions(config: HFConfig, row: RopeRow) -> int:
    """The longest sequence that the checkpoint promises to handle.

    A stretched embedding multiplies the length of training by its factor, and `max_position_embeddings` doesn't have to
    mention the product: `transformers` used to ask that linear scaling leave it alone, and Qwen's instructions for long texts
    add `rope_scaling` alone. As in vLLM, but for a `max_position_embeddings` that is larger.
    """
    given = resolve(MAX_POSITIONS, config)
    parameters = rope_parameters(config, row)
    if parameters["rope_type"] == "default":
        return given
    return max(given, int(_factor(parameters, config) * _original_max_positions(parameters, config)))


def latent_attention_scale(config: HFConfig, row: RopeRow, *, head_dim: int) -> float:
    """DeepSeek's factor on query-key products: `head_dim ** -0.5`, times YaRN's temperature squared with `mscale_all_dim`."""
    parameters = rope_parameters(config, row)
    scale = head_dim**-0.5
    if not parameters.get("mscale_all_dim"):
        return scale
    return scale * _temperature(_factor(parameters, config), parameters["mscale_all_dim"]) ** 2


def _scaling(parameters: Mapping[str, Any], config: HFConfig) -> LinearScaling | YarnScaling | None:
    if parameters["rope_type"] == "default":
        return None
    factor = _factor(parameters, config)
    if parameters["rope_type"] == "linear":
        return LinearScaling(factor=factor)
    return YarnScaling(
        factor=factor,
        original_max_positions=_original_max_positions(parameters, config),
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        truncate=parameters.get("truncate", True),
        attention_factor=_attention_factor(parameters, factor),
    )


def _original_max_positions(parameters: Mapping[str, Any], config: HFConfig) -> int:
    given = parameters.get("original_max_position_embeddings")
    return resolve(MAX_POSITIONS, config) if given is None else given


def _factor(parameters: Mapping[str, Any], config: HFConfig) -> float:
    if "factor" in parameters:
        return float(parameters["factor"])
    if parameters["rope_type"] == "yarn":
        return resolve(MAX_POSITIONS, config) / _original_max_positions(parameters, config)
    raise ValueError(f"config.json: rope_type {parameters['rope_type']!r} needs a factor, got none")


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
    return _temperature(factor, 1.0)


def _temperature(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 · mscale · ln(factor) + 1, or 1 when sequences aren't stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
