"""The block switches of a family as one row of settings, and how a row and a `config.json` make a `Decoder`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import GroupLimit, MoEConfig, RouterConfig, SharedExpertsConfig
from moe_jax.families.attention_rows import GroupedQueryRow, LatentRow
from moe_jax.families.config_keys import check_keys
from moe_jax.families.decoder import Decoder, DenseFeedForward, Layer
from moe_jax.families.layer_plans import PerLayer, every_layer
from moe_jax.families.settings import HFConfig, Setting, key, resolve

HIDDEN_SIZE = key("hidden_size")

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""Hugging Face's name of an activation -> ours."""


def hidden_activation(config: HFConfig) -> str:
    """The activation that `hidden_act` names; ValueError with the known names for any other."""
    name = resolve(key("hidden_act", default="silu"), config)
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureRow:
    """Settings of the Mixture-of-Experts layers."""

    num_experts: Setting
    intermediate_size: Setting
    top_k: Setting = key("num_experts_per_tok")
    activation: Setting = hidden_activation
    router: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    """Fields of `RouterConfig`."""
    group_limit: Mapping[str, Setting] | None = None
    """Fields of `GroupLimit`."""
    limits_groups: Setting = True
    """Whether `group_limit` applies."""
    shared_experts: Mapping[str, Setting] | None = None
    """Fields of `SharedExpertsConfig`; an intermediate size of 0 means none."""
    expert_bias: Setting = False
    where: Callable[[HFConfig], PerLayer] = every_layer
    """Which layers have a Mixture of Experts."""

    def build(self, config: HFConfig) -> MoEConfig:
        """The layer's configuration."""
        router: dict[str, Any] = resolve(self.router, config)
        if self.group_limit is not None and resolve(self.limits_groups, config):
            router["group_limit"] = GroupLimit(**resolve(self.group_limit, config))
        shared = None
        if self.shared_experts is not None:
            fields = resolve(self.shared_experts, config)
            shared = SharedExpertsConfig(**fields) if fields["intermediate_size"] else None
        return MoEConfig(
            hidden_size=resolve(HIDDEN_SIZE, config),
            intermediate_size=resolve(self.intermediate_size, config),
            num_experts=resolve(self.num_experts, config),
            top_k=resolve(self.top_k, config),
            activation=resolve(self.activation, config),
            router=RouterConfig(**router),
            shared_experts=shared,
            expert_bias=resolve(self.expert_bias, config),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderRow:
    """Settings of a whole decoder; calling it with a `config.json` builds the decoder's description."""

    attention: GroupedQueryRow | LatentRow
    mixture: MixtureRow
    norm_epsilon: Setting = key("rms_norm_eps")
    dense_intermediate_size: Setting = key("intermediate_size")
    dense_bias: Setting = False
    tie_word_embeddings: Setting = key("tie_word_embeddings", default=False)
    refused: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    """Keys that change the result -> the values (besides null) under which they don't."""
    read: tuple[str, ...] = ()
    """Keys that the row's functions read, beside its settings."""
    ignored: tuple[str, ...] = ()
    """Keys of this family that never change what is computed."""

    def __call__(self, config: HFConfig) -> Decoder:
        """Raises ValueError naming every key that changes the result and isn't supported, and a missing key."""
        check_keys(self, config)
        mixture = self.mixture.build(config)
        is_sparse = self.mixture.where(config)
        dense = None if all(is_sparse) else self._dense(config)
        attention = self.attention.layers(config)
        return Decoder(
            vocab_size=resolve(key("vocab_size"), config),
            hidden_size=resolve(HIDDEN_SIZE, config),
            layers=tuple(
                Layer(attention=attention[i], feed_forward=mixture if dense is None or sparse else dense)
                for i, sparse in enumerate(is_sparse)
            ),
            norm_epsilon=resolve(self.norm_epsilon, config),
            tie_word_embeddings=resolve(self.tie_word_embeddings, config),
            max_positions=resolve(key("max_position_embeddings"), config),
        )

    def _dense(self, config: HFConfig) -> DenseFeedForward:
        return DenseFeedForward(
            intermediate_size=resolve(self.dense_intermediate_size, config),
            activation=hidden_activation(config),
            bias=resolve(self.dense_bias, config),
        )
