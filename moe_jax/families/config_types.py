"""What type the values of a `config.json` must have: a wrong one is named here, not where it would fail in a computation."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class JSONType:
    """A type of JSON values."""

    words: str
    """As an error says it: "must be ..."."""
    accepts: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


INTEGER = JSONType("an integer", _is_integer)
NUMBER = JSONType(
    "a finite number", lambda value: _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
)
BOOLEAN = JSONType("true or false", lambda value: isinstance(value, bool))
STRING = JSONType("a string", lambda value: isinstance(value, str))
OBJECT = JSONType("an object", lambda value: isinstance(value, Mapping))
INTEGERS = JSONType(
    "a list of integers", lambda value: isinstance(value, list | tuple) and all(map(_is_integer, value))
)
STRINGS = JSONType(
    "a list of strings",
    lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
)

CONFIG_TYPES: Mapping[str, JSONType] = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings",
            "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "max_window_layers",
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
            "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "n_group", "topk_group", "first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq",
        ),
        INTEGER,
    ),
    **dict.fromkeys(
        (
            "rms_norm_eps", "rope_theta", "partial_rotary_factor", "clip_qkv", "routed_scaling_factor", "swiglu_limit",
            "swiglu_alpha", "router_jitter_noise",
        ),
        NUMBER,
    ),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "qkv_bias", "mlp_bias", "use_sliding_window", "use_qk_norm",
            "norm_topk_prob", "rope_interleave",
        ),
        BOOLEAN,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "topk_method", "scoring_func"), STRING),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config"), OBJECT),
    "mlp_only_layers": INTEGERS,
    "layer_types": STRINGS,
}  # fmt: skip
"""Every key that a family reads -> its type. Null counts as absent."""

ROPE_PARAMETER_TYPES: Mapping[str, JSONType] = {
    **dict.fromkeys(("rope_type", "type"), STRING),
    **dict.fromkeys(
        (
            "rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
            "attention_factor",
        ),
        NUMBER,
    ),
    "original_max_position_embeddings": INTEGER,
    "truncate": BOOLEAN,
}  # fmt: skip
"""The same for what is inside `rope_parameters` or `rope_scaling`."""


def check_types(values: Mapping[str, Any], types: Mapping[str, JSONType], inside: str = "") -> None:
    """Raise ValueError naming every one of `values` that has another type than `types` says.

    Args:
        values: `config.json`, or an object in it.
        types: key -> type; what isn't there may be anything.
        inside: the key of that object.
    """
    prefix = f"{inside}." if inside else ""
    problems = [
        f"{prefix}{name} must be {types[name].words}, got {value!r}"
        for name, value in values.items()
        if value is not None and name in types and not types[name].accepts(value)
    ]
    if problems:
        raise ValueError(f"config.json: {'; '.join(problems)}")
