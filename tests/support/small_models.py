"""Descriptions of models so small that creating and compiling them is what takes time."""

from typing import Any

from support.published_configs import CONFIGS

from moe_jax.families import get_family
from moe_jax.families.decoder import Decoder

SMALL = {
    "hidden_size": 8,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 4,
    "moe_intermediate_size": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def small_decoder(**changes: Any) -> Decoder:
    """A Qwen3-MoE with four experts in each layer."""
    config = {**CONFIGS["qwen3_moe"], **SMALL, **changes}
    return get_family(config).build_decoder(config)
