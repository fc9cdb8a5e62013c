"""All family rows, by `model_type`."""

from collections.abc import Mapping

from moe_jax.families.deepseek_v2 import DEEPSEEK_V2
from moe_jax.families.deepseek_v3 import DEEPSEEK_V3, KIMI_K2
from moe_jax.families.family import Family
from moe_jax.families.glm4_moe import GLM4_MOE
from moe_jax.families.gpt_oss import GPT_OSS
from moe_jax.families.mixtral import MIXTRAL
from moe_jax.families.olmoe import OLMOE
from moe_jax.families.qwen2_moe import QWEN2_MOE
from moe_jax.families.qwen3_moe import QWEN3_MOE
from moe_jax.families.settings import HFConfig

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2, GLM4_MOE, GPT_OSS)
}


def get_family(config: HFConfig) -> Family:
    """The family of a `config.json`; ValueError with the known ones when its `model_type` is unknown."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
