"""The configuration of a checkpoint in the words that published (older) checkpoints use."""

from typing import Any

OLD_NAMES = {"dtype": "torch_dtype", "mlp_layer_types": None, "layer_types": None}
"""Key of `transformers` 5 -> older key, or None where older files have none (the value follows from other keys)."""

OLD_NAMES_OF_FAMILY: dict[str, dict[str, str | None]] = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "deepseek_v2": {"num_experts": "n_routed_experts", "head_dim": None},
    "deepseek_v3": {"num_local_experts": "n_routed_experts", "head_dim": None, "rope_interleave": "rope_interleave"},
    "glm4_moe": {"num_local_experts": "n_routed_experts"},
    "gpt_oss": {"layer_types": "layer_types"},
}
"""Exceptions by family."""

ROPE_TYPE_KEY = {"deepseek_v2": "type", "deepseek_v3": "type"}
"""DeepSeek's `rope_scaling` says `type`, the others say `rope_type`."""


def hub_style_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, as `transformers` 5 writes it, with `rope_theta`, `rope_scaling`, `torch_dtype` and older key names."""
    family = config["model_type"]
    renamed = OLD_NAMES | OLD_NAMES_OF_FAMILY.get(family, {})
    result = {}
    for key, value in config.items():
        if key in ("rope_parameters", "quantization_config"):
            continue
        new_key = renamed.get(key, key)
        if new_key is not None:
            result[new_key] = value
    rope = dict(config["rope_parameters"])
    result["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        result["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope_type = rope.pop("rope_type")
    result["rope_scaling"] = (
        None if rope_type == "default" else {ROPE_TYPE_KEY.get(family, "rope_type"): rope_type, **rope}
    )
    result["transformers_version"] = "4.51.0"
    return dict(sorted(result.items()))
