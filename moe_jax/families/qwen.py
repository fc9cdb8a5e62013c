"""What the Qwen families share: softmax routing, renormalised if the config says so, and dense layers in between."""

from moe_jax.families.settings import HFConfig, key

SOFTMAX_ROUTER = {
    "renormalize": key("norm_topk_prob", default=False),
    "round_weights_to_input_dtype": True,
}
"""Fields of `RouterConfig`."""

SPARSE_STEP_KEYS = ("decoder_sparse_step", "mlp_only_layers")
"""Keys behind `sparse_step`."""

SLIDING_WINDOW_KEYS = ("use_sliding_window", "sliding_window")
"""Keys behind `sliding_window`."""


def sliding_window(config: HFConfig) -> int | None:
    """The window counts only when `use_sliding_window` says so."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
