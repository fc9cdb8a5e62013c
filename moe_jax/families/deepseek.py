"""What DeepSeek-V2, DeepSeek-V3 and GLM-4.5 share: shared experts, first layers dense, and V3's sigmoid routing."""

from typing import Any

from moe_jax.families.attention_rows import NUM_HEADS
from moe_jax.families.layer_plans import after_first_dense
from moe_jax.families.settings import HFConfig, key, resolve

EXPERT_SIZE = key("moe_intermediate_size")
NUM_SHARED_EXPERTS = key("n_shared_experts", null=0)
NUM_GROUPS = key("n_group")


def shared_experts_size(config: HFConfig) -> int:
    """All shared experts are one MLP, as wide as they are together."""
    return resolve(EXPERT_SIZE, config) * resolve(NUM_SHARED_EXPERTS, config)


def has_groups(config: HFConfig) -> bool:
    """One group limits nothing."""
    return resolve(NUM_GROUPS, config) > 1


MIXTURE: dict[str, Any] = {
    "intermediate_size": EXPERT_SIZE,
    "where": after_first_dense,
}
"""Fields of `MixtureRow` that the three share."""

SIGMOID_ROUTER = {
    "scoring": "sigmoid",
    "correction_bias": True,
    "renormalize": key("norm_topk_prob", default=True),
    "renormalize_epsilon": 1e-20,
    "routed_scaling_factor": key("routed_scaling_factor"),
}
"""DeepSeek-V3's fields of `RouterConfig`."""

BIASED_GROUP_LIMIT = {
    "num_groups": NUM_GROUPS,
    "groups_kept": key("topk_group"),
    "score": "top2_sum",
    "masked_score": float("-inf"),
}
"""DeepSeek-V3's fields of `GroupLimit`."""

MIXTURE_KEYS = ("first_k_dense_replace", "n_shared_experts")
"""Keys behind the functions above."""

LATENT_ATTENTION_KEYS = ("head_dim", "qk_head_dim")
"""Keys that `transformers` writes for its own use; both follow from others."""


PREDICTION_LAYERS = key("num_nextn_predict_layers", default=1)
"""Layers for multi-token prediction (DeepSeek-V3, section 2.2). A config that doesn't say has one, as in DeepSeek's own
configuration class and in those of `transformers`."""


def one_kv_head_per_head(config: HFConfig) -> tuple[int, ...]:
    """Latent attention has a key and a value per query head."""
    return (resolve(NUM_HEADS, config),)
