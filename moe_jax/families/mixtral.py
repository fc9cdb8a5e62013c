"""Mixtral (Mistral AI): softmax over all experts, renormalised top-k, no shared experts."""

from moe_jax.families.attention_rows import GroupedQueryRow
from moe_jax.families.decoder_row import DecoderRow, MixtureRow
from moe_jax.families.family import Family
from moe_jax.families.names import DECODER_NAMES, ExpertNames
from moe_jax.families.rope import RopeRow
from moe_jax.families.settings import key

ROUTER_WEIGHT = "layers.{layer}.feed_forward.router.weight"

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    build_decoder=DecoderRow(
        attention=GroupedQueryRow(sliding_window=key("sliding_window", default=None), rope=RopeRow(theta=1e6)),
        mixture=MixtureRow(
            intermediate_size=key("intermediate_size"),
            router={"renormalize": True},
        ),
        refused={"router_jitter_noise": (0.0,)},
    ),
    names={**DECODER_NAMES, ROUTER_WEIGHT: "model.layers.{layer}.block_sparse_moe.gate.weight"},
    fused_names={ROUTER_WEIGHT: "model.layers.{layer}.mlp.gate.weight"},
    experts=ExpertNames(per_expert_block="model.layers.{layer}.block_sparse_moe", gate="w1", down="w2", up="w3"),
)
