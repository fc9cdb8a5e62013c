"""gpt-oss (OpenAI): attention sinks, a sliding window in every other layer, clamped experts with biases."""

from moe_jax.families.attention_rows import GroupedQueryRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.family import Family
from moe_jax.families.layer_plans import listed_or_every_other
from moe_jax.families.names import DECODER_NAMES, ExpertNames
from moe_jax.families.rope import RopeRow
from moe_jax.families.settings import HFConfig, key, resolve
from moe_jax.kernels import Activation

LIMIT = key("swiglu_limit", default=7.0)
ALPHA = key("swiglu_alpha", default=1.702)


def clamped_swiglu(config: HFConfig) -> Activation:
    """Gate and up are clamped, and 1 is added to up."""
    return Activation("swigluoai", limit=resolve(LIMIT, config), alpha=resolve(ALPHA, config))


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    build_decoder=DecoderRow(
        attention=GroupedQueryRow(
            head_dim=key("head_dim"),
            qkv_bias=key("attention_bias", default=True),
            output_bias=key("attention_bias", default=True),
            sinks=True,
            sliding_window=key("sliding_window", default=128, null=None),
            slides=listed_or_every_other,
            rope=RopeRow(
                theta=150000.0,
                parameters={
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
            ),
        ),
        mixture=MixtureRow(
            intermediate_size=key("intermediate_size"),
            activation=clamped_swiglu,
            router={"score_after_top_k": True, "logits_bias": True, "round_weights_to_input_dtype": True},
            expert_bias=True,
        ),
        refused={"hidden_act": ("silu",)},
        read=("swiglu_limit", "swiglu_alpha", "layer_types"),
        ignored=("experts_per_token", "initial_context_length"),
    ),
    names={
        **DECODER_NAMES,
        "layers.{layer}.feed_forward.router.weight": "model.layers.{layer}.mlp.router.weight",
        "layers.{layer}.feed_forward.router.bias": "model.layers.{layer}.mlp.router.bias",
    },
    experts=ExpertNames(per_expert_block=None, fused_transposed=True, fused_interleaved=True),
    native_form="fused",
)
