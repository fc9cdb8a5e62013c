"""Descriptions of models so small that creating and compiling them is what takes time."""

import dataclasses
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


def alternating_decoder(num_layers: int) -> Decoder:
    """The same with experts of two widths, which take turns: one compiled group of two layers."""
    decoder = small_decoder(num_hidden_layers=num_layers)
    layers = list(decoder.layers)
    for index in range(1, num_layers, 2):
        wider = dataclasses.replace(layers[index].feed_forward, intermediate_size=8)
        layers[index] = dataclasses.replace(layers[index], feed_forward=wider)
    return dataclasses.replace(decoder, layers=tuple(layers))
