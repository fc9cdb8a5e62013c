"""What the golden cases are: one row of data per case; `make_golden.py` turns rows into folders.

Sizes are odd on purpose: 9 or 12 experts of which 3 are chosen, heads wider than hidden_size / heads where the family
allows it, widths that differ, so that a transposed or misread tensor cannot go unnoticed. Windows
(8) and YaRN's original lengths (16) are shorter than the prompts (up to 40 tokens, 65 with what is generated).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Form = Literal["per_expert", "fused", "mxfp4", "block_fp8"]

NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Nothing ends a generation early."""

COMMON: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    **NO_SPECIAL_TOKENS,
}

YARN_DEEPSEEK = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}

MLA = {"num_key_value_heads": 4, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 14}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenSpec:
    """One golden case."""

    family: str
    """`model_type`."""
    name: str
    """Folder of the case."""
    covers: str
    """The switches that this case is there for."""
    config: Mapping[str, Any]
    """Arguments of the family's config class, beside `COMMON`."""
    forms: tuple[Form, ...] = ("per_expert", "fused")
    """In which forms the weights are stored."""
    sharded: tuple[Form, ...] = ()
    """Forms that are split into several files with an index."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored weights (results are always computed in float32)."""
    correction_bias_mean: float = 0.0
    """Mean of `e_score_correction_bias`; a strongly negative one makes biased scores negative, so that the value which
    masks the groups left out matters."""
    mtp_layer: bool = False
    """Append tensors of a multi-token-prediction layer, which a reader must drop."""
    fp8_block: tuple[int, int] | None = None
    """Block size of the "block_fp8" form; it does not divide the widths, so the last blocks are ragged."""


SPECS: tuple[GoldenSpec, ...] = (
    GoldenSpec(
        family="mixtral",
        name="sliding",
        covers="sliding window in every layer, untied embeddings, head_dim wider than hidden/heads, sharded",
        config=dict(
            intermediate_size=20,
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=9,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        sharded=("per_expert",),
    ),
    GoldenSpec(
        family="mixtral",
        name="full_tied",
        covers="no window, tied embeddings, one key-value head, 12 experts, stored in bfloat16",
        config=dict(
            intermediate_size=28,
            num_hidden_layers=2,
            num_key_value_heads=1,
            num_local_experts=12,
            sliding_window=None,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        dtype="bfloat16",
    ),
    GoldenSpec(
        family="qwen3_moe",
        name="renormalized",
        covers="norm_topk_prob, a dense layer by mlp_only_layers, head_dim wider than hidden/heads",
        config=dict(
            intermediate_size=40,
            moe_intermediate_size=20,
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=9,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
    ),
    GoldenSpec(
        family="qwen3_moe",
        name="raw_probabilities",
        covers="raw probabilities, decoder_sparse_step 2, attention biases, sliding window, tied, YaRN, sharded",
        config=dict(
            intermediate_size=36,
            moe_intermediate_size=20,
            num_hidden_layers=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=12,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=8,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 1.0,
                "beta_slow": 0.1,
            },
        ),
        sharded=("fused",),
    ),
    GoldenSpec(
        family="qwen2_moe",
        name="every_second_layer",
        covers="decoder_sparse_step 2, norm_topk_prob, query/key/value biases, sigmoid-gated shared expert, no window",
        config=dict(
            intermediate_size=40,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
            num_hidden_layers=4,
            num_key_value_heads=2,
            num_experts=9,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
    ),
    GoldenSpec(
        family="qwen2_moe",
        name="window_in_even_layers",
        covers="window in layers 0 and 2, mlp_only_layers, raw probabilities, no biases, explicit head_dim",
        config=dict(
            intermediate_size=36,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=20,
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=12,
            norm_topk_prob=False,
            mlp_only_layers=[0],
            qkv_bias=False,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=3,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    GoldenSpec(
        family="olmoe",
        name="clipped",
        covers="clip_qkv that really clips, norm_topk_prob false, one norm over all heads, grouped queries",
        config=dict(
            intermediate_size=20,
            num_hidden_layers=3,
            num_key_value_heads=2,
            num_experts=9,
            norm_topk_prob=False,
            clip_qkv=0.9,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
    ),
    GoldenSpec(
        family="olmoe",
        name="renormalized",
        covers="norm_topk_prob, no clipping, attention biases, as many key-value heads as heads, 12 experts",
        config=dict(
            intermediate_size=16,
            num_hidden_layers=2,
            num_key_value_heads=4,
            num_experts=12,
            norm_topk_prob=True,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    GoldenSpec(
        family="deepseek_v2",
        name="greedy",
        covers="topk_method greedy, no query low-rank, no YaRN, first layer dense, routed_scaling_factor 1",
        config=dict(
            **MLA,
            q_lora_rank=None,
            intermediate_size=36,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            n_routed_experts=9,
            n_shared_experts=2,
            topk_method="greedy",
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
    ),
    GoldenSpec(
        family="deepseek_v2",
        name="group_limited",
        covers="group_limited_greedy, query low-rank, YaRN with mscale, norm_topk_prob (ignored), attention biases",
        config=dict(
            **MLA,
            q_lora_rank=24,
            intermediate_size=36,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            n_routed_experts=12,
            n_shared_experts=2,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.3,
            norm_topk_prob=True,
            attention_bias=True,
            rope_parameters=YARN_DEEPSEEK,
        ),
    ),
    GoldenSpec(
        family="deepseek_v3",
        name="yarn",
        covers="interleaved RoPE, YaRN with mscale, 2 of 3 groups, query low-rank, first layer dense, sharded",
        config=dict(
            **MLA,
            q_lora_rank=24,
            intermediate_size=36,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            n_routed_experts=9,
            n_shared_experts=2,
            n_group=3,
            topk_group=2,
            routed_scaling_factor=2.5,
            num_mtp_layers=0,
            rope_parameters=YARN_DEEPSEEK,
        ),
        sharded=("fused",),
    ),
    GoldenSpec(
        family="deepseek_v3",
        name="negative_bias",
        covers="biased scores below zero, 2 of 4 groups, not renormalized, half-split RoPE, biases, MTP layer",
        config=dict(
            **MLA,
            q_lora_rank=None,
            intermediate_size=36,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            first_k_dense_replace=0,
            n_routed_experts=12,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            norm_topk_prob=False,
            routed_scaling_factor=1.7,
            num_mtp_layers=1,
            rope_interleave=False,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        correction_bias_mean=-1.5,
        mtp_layer=True,
    ),
    GoldenSpec(
        family="deepseek_v3",
        name="block_fp8",
        covers="block FP8 with ragged last blocks beside the same weights in float32, MTP layer",
        config=dict(
            **MLA,
            q_lora_rank=24,
            intermediate_size=36,
            moe_intermediate_size=20,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            n_routed_experts=9,
            n_shared_experts=2,
            n_group=3,
            topk_group=2,
            num_mtp_layers=1,
            rope_parameters=YARN_DEEPSEEK,
        ),
        forms=("per_expert", "block_fp8"),
        mtp_layer=True,
        fp8_block=(32, 32),
    ),
    GoldenSpec(
        family="glm4_moe",
        name="qk_norm",
        covers="query/key norms, half of each head rotated, shared experts, first layer dense, MTP layer",
        config=dict(
            intermediate_size=36,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=16,
            first_k_dense_replace=1,
            n_routed_experts=9,
            n_shared_experts=2,
            n_group=3,
            topk_group=2,
            routed_scaling_factor=1.5,
            use_qk_norm=True,
            num_mtp_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        ),
        mtp_layer=True,
    ),
    GoldenSpec(
        family="glm4_moe",
        name="biases",
        covers="attention biases, no query/key norms, a quarter of each head rotated, one group, not renormalized",
        config=dict(
            intermediate_size=36,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_key_value_heads=1,
            head_dim=16,
            first_k_dense_replace=0,
            n_routed_experts=12,
            n_shared_experts=1,
            norm_topk_prob=False,
            attention_bias=True,
            num_mtp_layers=0,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        ),
        correction_bias_mean=-0.7,
    ),
    GoldenSpec(
        family="gpt_oss",
        name="yarn_untruncated",
        covers="YaRN with truncate false, alternating layer kinds (an odd number), sinks, biases, a clamp that bites",
        config=dict(
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=18,
            num_local_experts=9,
            sliding_window=8,
            swiglu_limit=1.25,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 1.0,
                "beta_slow": 0.1,
                "truncate": False,
            },
        ),
        forms=("fused", "mxfp4"),
        sharded=("fused",),
    ),
    GoldenSpec(
        family="gpt_oss",
        name="bfloat16",
        covers="stored in bfloat16, other layer_types, YaRN truncated, two MXFP4 groups per row, no attention biases",
        config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_key_value_heads=4,
            head_dim=16,
            num_local_experts=12,
            sliding_window=8,
            swiglu_limit=7.0,
            attention_bias=False,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 1.0,
                "beta_slow": 0.1,
            },
        ),
        forms=("fused", "mxfp4"),
        dtype="bfloat16",
    ),
)
