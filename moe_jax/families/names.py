"""Hugging Face names of our parameters, as templates: `{layer}` and `{expert}` stand for a layer's and an expert's number."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

CheckpointForm = Literal["per_expert", "fused"]
"""`per_expert`: one tensor per expert and projection. `fused`: all experts of a layer in one tensor."""

LEAVES = {"kernel": "weight", "bias": "bias"}
"""Parameters of a linear map."""

ATTENTION_NAMES: Mapping[str, str] = {
    **{
        f"layers.{{layer}}.attention.{ours}.{leaf}": f"model.layers.{{layer}}.self_attn.{theirs}.{their_leaf}"
        for ours, theirs in {
            "q_proj": "q_proj",
            "k_proj": "k_proj",
            "v_proj": "v_proj",
            "o_proj": "o_proj",
            "q_a_proj": "q_a_proj",
            "q_b_proj": "q_b_proj",
            "kv_a_proj": "kv_a_proj_with_mqa",
            "kv_b_proj": "kv_b_proj",
        }.items()
        for leaf, their_leaf in LEAVES.items()
    },
    **{
        f"layers.{{layer}}.attention.{ours}.scale": f"model.layers.{{layer}}.self_attn.{theirs}.weight"
        for ours, theirs in {
            "q_norm": "q_norm",
            "k_norm": "k_norm",
            "q_a_norm": "q_a_layernorm",
            "kv_a_norm": "kv_a_layernorm",
        }.items()
    },
    "layers.{layer}.attention.sinks": "model.layers.{layer}.self_attn.sinks",
}

DECODER_NAMES: Mapping[str, str] = {
    "embedder.embedding": "model.embed_tokens.weight",
    "layers.{layer}.attention_norm.scale": "model.layers.{layer}.input_layernorm.weight",
    **ATTENTION_NAMES,
    "layers.{layer}.feed_forward_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    **{
        f"layers.{{layer}}.feed_forward.{projection}.{ours}": f"model.layers.{{layer}}.mlp.{projection}.{theirs}"
        for projection in ("gate_proj", "up_proj", "down_proj")
        for ours, theirs in LEAVES.items()
    },
    "layers.{layer}.feed_forward.router.weight": "model.layers.{layer}.mlp.gate.weight",
    "layers.{layer}.feed_forward.router.correction_bias": "model.layers.{layer}.mlp.gate.e_score_correction_bias",
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
"""Names that most families share; a family row adds its own and overrides where it differs."""


def shared_expert_names(module: str, gate: str | None = None) -> dict[str, str]:
    """Names of the shared experts held by `mlp.<module>`, and of their sigmoid gate `mlp.<gate>` if there is one."""
    names = {
        f"layers.{{layer}}.feed_forward.shared_experts.{projection}.{ours}": (
            f"model.layers.{{layer}}.mlp.{module}.{projection}.{theirs}"
        )
        for projection in ("gate_proj", "up_proj", "down_proj")
        for ours, theirs in LEAVES.items()
    }
    if gate is not None:
        names["layers.{layer}.feed_forward.shared_experts.gate.kernel"] = f"model.layers.{{layer}}.mlp.{gate}.weight"
    return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """How a family's checkpoints name and lay out the routed experts' weights.

    Per-expert form: `{per_expert_block}.experts.{expert}.{gate|down|up}.weight`, each (out, in).
    Fused form: `{fused_block}.experts.gate_up_proj` `[E, 2I, H]` and `.down_proj` `[E, H, I]`,
    with `_bias` beside them.
    """

    per_expert_block: str | None = "model.layers.{layer}.mlp"
    """Where the per-expert form keeps its experts; None: the family has no such form."""
    gate: str = "gate_proj"
    down: str = "down_proj"
    up: str = "up_proj"
    fused_block: str = "model.layers.{layer}.mlp"
    """Where the fused form keeps its experts."""
    fused_transposed: bool = False
    """The fused tensors are (in, out): `[E, H, 2I]` and `[E, I, H]`."""
    fused_interleaved: bool = False
    """Gate and up alternate along the fused axis (gate even, up odd) instead of following each other."""
