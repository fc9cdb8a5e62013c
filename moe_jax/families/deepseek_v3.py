"""DeepSeek-V3 (arXiv 2412.19437): latent attention, sigmoid routing steered by a bias within the best groups."""

import dataclasses

from moe_jax.families.attention_rows import LatentRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.deepseek import (
    BIASED_GROUP_LIMIT,
    LATENT_ATTENTION_KEYS,
    MIXTURE,
    MIXTURE_KEYS,
    PREDICTION_LAYERS,
    SIGMOID_ROUTER,
    has_groups,
    one_kv_head_per_head,
    shared_experts_size,
)
from moe_jax.families.family import Family
from moe_jax.families.names import DECODER_NAMES, shared_expert_names
from moe_jax.families.settings import key

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    build_decoder=DecoderRow(
        attention=LatentRow(interleaved=key("rope_interleave", default=True)),
        mixture=MixtureRow(
            **MIXTURE,
            router=SIGMOID_ROUTER,
            group_limit=BIASED_GROUP_LIMIT,
            limits_groups=has_groups,
            shared_experts={"intermediate_size": shared_experts_size},
        ),
        refused={
            "topk_method": ("noaux_tc",),
            "scoring_func": ("sigmoid",),
            "moe_layer_freq": (1,),
            "num_key_value_heads": one_kv_head_per_head,
        },
        read=MIXTURE_KEYS,
        ignored=LATENT_ATTENTION_KEYS,
    ),
    names={**DECODER_NAMES, **shared_expert_names("shared_experts")},
    prediction_layers=PREDICTION_LAYERS,
)

KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, model_type="kimi_k2")
"""Kimi-K2 (Moonshot AI, arXiv 2507.20534): the same decoder in other sizes, under a name of its own."""
