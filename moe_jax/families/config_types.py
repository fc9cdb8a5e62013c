"""What type the values of a `config.json` must have."""

from collections.abc import Mapping

from moe_jax.json_types import (
    BOOLEAN,
    COUNT,
    INTEGERS,
    NATURAL,
    NUMBER,
    NUMBER_ABOVE_1,
    NUMBER_FROM_0,
    OBJECT,
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    STRING,
    STRINGS,
    JSONType,
)

CONFIG_TYPES: Mapping[str, JSONType] = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "max_position_embeddings",
            "num_attention_heads", "num_key_value_heads", "head_dim",
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "intermediate_size", "moe_intermediate_size",
            "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k",
            "n_group", "topk_group", "decoder_sparse_step", "moe_layer_freq",
        ),
        POSITIVE_INTEGER,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), COUNT
    ),
    **dict.fromkeys(
        (
            "sliding_window", "max_window_layers", "shared_expert_intermediate_size", "n_shared_experts",
            "first_k_dense_replace", "num_nextn_predict_layers",
        ),
        NATURAL,
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "partial_rotary_factor", "clip_qkv", "swiglu_limit"), POSITIVE_NUMBER
    ),
    **dict.fromkeys(("routed_scaling_factor", "swiglu_alpha", "router_jitter_noise"), NUMBER),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "qkv_bias", "mlp_bias", "use_sliding_window", "use_qk_norm",
            "norm_topk_prob", "rope_interleave",
        ),
        BOOLEAN,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "topk_method", "scoring_func"), STRING),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config"), OBJECT),
    "rope_theta": NUMBER_ABOVE_1,
    "mlp_only_layers": INTEGERS,
    "layer_types": STRINGS,
}  # fmt: skip
"""Every key that a family reads -> its type. Null counts as absent."""

ROPE_PARAMETER_TYPES: Mapping[str, JSONType] = {
    **dict.fromkeys(("rope_type", "type"), STRING),
    **dict.fromkeys(("partial_rotary_factor", "factor", "attention_factor"), POSITIVE_NUMBER),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), NUMBER_FROM_0),
    "rope_theta": NUMBER_ABOVE_1,
    "original_max_position_embeddings": POSITIVE_INTEGER,
    "truncate": BOOLEAN,
}  # fmt: skip
"""The same for what is inside `rope_parameters` or `rope_scaling`."""
