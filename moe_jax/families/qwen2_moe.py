"""Qwen2-MoE (Alibaba): biases on query, key and value, and shared experts behind a sigmoid gate."""

from moe_jax.families.attention_rows import GroupedQueryRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.family import Family
from moe_jax.families.layer_plans import listed_or_every_other_below, sparse_step
from moe_jax.families.names import DECODER_NAMES, shared_expert_names
from moe_jax.families.qwen import SLIDING_WINDOW_KEYS, SOFTMAX_ROUTER, SPARSE_STEP_KEYS, sliding_window
from moe_jax.families.settings import key

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    build_decoder=DecoderRow(
        attention=GroupedQueryRow(
            qkv_bias=key("qkv_bias", default=True),
            sliding_window=sliding_window,
            slides=listed_or_every_other_below,
        ),
        mixture=MixtureRow(
            intermediate_size=key("moe_intermediate_size"),
            router=SOFTMAX_ROUTER,
            shared_experts={"intermediate_size": key("shared_expert_intermediate_size"), "sigmoid_gate": True},
            where=sparse_step,
        ),
        read=(*SLIDING_WINDOW_KEYS, *SPARSE_STEP_KEYS, "max_window_layers", "layer_types"),
    ),
    names={**DECODER_NAMES, **shared_expert_names("shared_expert", gate="shared_expert_gate")},
)
