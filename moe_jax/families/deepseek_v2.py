"""DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax routing that keeps the groups of the best experts.

As in Hugging Face's model, and unlike vLLM's, `norm_topk_prob` is not read, and experts of other groups score
0, not -inf.
"""

from moe_jax.families.attention_rows import LatentRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.deepseek import (
    LATENT_ATTENTION_KEYS,
    MIXTURE,
    MIXTURE_KEYS,
    NUM_GROUPS,
    one_kv_head_per_head,
    shared_experts_size,
)
from moe_jax.families.family import Family
from moe_jax.families.names import DECODER_NAMES, shared_expert_names
from moe_jax.families.settings import HFConfig, key


def is_group_limited(config: HFConfig) -> bool:
    """`topk_method` decides whether the groups count."""
    return config.get("topk_method", "greedy") == "group_limited_greedy"


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    build_decoder=DecoderRow(
        attention=LatentRow(),
        mixture=MixtureRow(
            **MIXTURE,
            router={"renormalize": False, "routed_scaling_factor": key("routed_scaling_factor")},
            group_limit={
                "num_groups": NUM_GROUPS,
                "groups_kept": key("topk_group"),
                "score": "max",
                "masked_score": 0.0,
            },
            limits_groups=is_group_limited,
            shared_experts={"intermediate_size": shared_experts_size, "bias": key("mlp_bias", default=False)},
        ),
        dense_bias=key("mlp_bias", default=False),
        refused={
            "topk_method": ("greedy", "group_limited_greedy"),
            "scoring_func": ("softmax",),
            "moe_layer_freq": (1,),
            "rope_interleave": (True,),
            "num_key_value_heads": one_kv_head_per_head,
        },
        read=MIXTURE_KEYS,
        ignored=("norm_topk_prob", *LATENT_ATTENTION_KEYS),
    ),
    names={**DECODER_NAMES, **shared_expert_names("shared_experts")},
)
