"""Qwen3-MoE (Alibaba): per-head query/key norms, softmax routing whose renormalisation the config decides."""

from moe_jax.families.decoder_row import DecoderRow, GroupedQueryRow, MixtureRow, sparse_step
from moe_jax.families.family import Family
from moe_jax.families.names import DECODER_NAMES
from moe_jax.families.settings import HFConfig, key


def sliding_window(config: HFConfig) -> int | None:
    """The window counts only when `use_sliding_window` says so."""
    return config.get("sliding_window") if config.get("use_sliding_window") else None


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
            num_experts=key("num_experts", "num_local_experts"),
            intermediate_size=key("moe_intermediate_size"),
            router={"renormalize": key("norm_topk_prob", default=False)},
            where=sparse_step,
        ),
        read=("use_sliding_window", "sliding_window", "decoder_sparse_step", "mlp_only_layers"),
    ),
    names=DECODER_NAMES,
)
