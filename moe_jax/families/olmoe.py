"""OLMoE (Allen Institute for AI): query/key norms over the whole projection, clipped queries, keys and values."""

from moe_jax.families.attention_rows import GroupedQueryRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.family import Family
from moe_jax.families.names import DECODER_NAMES
from moe_jax.families.qwen import SOFTMAX_ROUTER
from moe_jax.families.settings import key

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    build_decoder=DecoderRow(
        attention=GroupedQueryRow(
            qkv_bias=key("attention_bias", default=False),
            output_bias=key("attention_bias", default=False),
            qk_norm="projection",
            clip_qkv=key("clip_qkv", default=None),
        ),
        mixture=MixtureRow(
            intermediate_size=key("intermediate_size"),
            router=SOFTMAX_ROUTER,
        ),
    ),
    names=DECODER_NAMES,
)
