"""Qwen3-MoE (Alibaba): per-head query/key norms, no shared experts."""

from moe_jax.families.attention_rows import GroupedQueryRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.family import Family
from moe_jax.families.layer_plans import sparse_step
from moe_jax.families.names import DECODER_NAMES
from moe_jax.families.qwen import SLIDING_WINDOW_KEYS, SOFTMAX_ROUTER, SPARSE_STEP_KEYS, sliding_window
from moe_jax.families.settings import key

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    build_decoder=DecoderRow(
        attention=GroupedQueryRow(
            qkv_bias=key("attention_bias", default=False),
            output_bias=key("attention_bias", default=False),
            qk_norm="head",
            sliding_window=sliding_window,
        ),
        mixture=MixtureRow(
            intermediate_size=key("moe_intermediate_size"),
            router=SOFTMAX_ROUTER,
            where=sparse_step,
        ),
        refused={"qkv_bias": (False,), "use_qk_norm": (True,), "shared_expert_intermediate_size": (0,)},
        read=(*SLIDING_WINDOW_KEYS, *SPARSE_STEP_KEYS),
        ignored=("max_window_layers",),
    ),
    names=DECODER_NAMES,
)
