"""GLM-4.5 (Zhipu AI): DeepSeek-V3's experts under grouped-query attention that rotates half of each head."""

from moe_jax.families.attention_rows import GroupedQueryRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.deepseek import (
    BIASED_GROUP_LIMIT,
    MIXTURE,
    MIXTURE_KEYS,
    PREDICTION_LAYERS,
    SIGMOID_ROUTER,
    has_groups,
    shared_experts_size,
)
from moe_jax.families.family import Family
from moe_jax.families.names import DECODER_NAMES, shared_expert_names
from moe_jax.families.rope import RopeRow
from moe_jax.families.settings import HFConfig, key


def qk_norm(config: HFConfig) -> str | None:
    """`use_qk_norm` switches per-head norms on."""
    return "head" if config.get("use_qk_norm") else None


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    build_decoder=DecoderRow(
        attention=GroupedQueryRow(
            qkv_bias=key("attention_bias", default=False),
            qk_norm=qk_norm,
            rope=RopeRow(rotary_fraction=0.5),
        ),
        mixture=MixtureRow(
            **MIXTURE,
            router=SIGMOID_ROUTER,
            group_limit=BIASED_GROUP_LIMIT,
            limits_groups=has_groups,
            shared_experts={"intermediate_size": shared_experts_size},
        ),
        refused={"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)},
        read=("use_qk_norm", *MIXTURE_KEYS),
    ),
    names={**DECODER_NAMES, **shared_expert_names("shared_experts")},
    prediction_layers=PREDICTION_LAYERS,
)
