"""The block switches of a family as one row of settings, and how a row and a `config.json` make a `Decoder`."""

import dataclasses
from collections.abc import Callable, Mapping

from moe_jax.config import GroupLimit, MoEConfig, RouterConfig, SharedExpertsConfig
from moe_jax.families.attention_rows import GroupedQueryRow, LatentRow
from moe_jax.families.config_keys import check_keys
from moe_jax.families.decoder import Decoder, DenseFeedForward, Layer
from moe_jax.families.layer_plans import PerLayer, every_layer
from moe_jax.families.rope import max_positions
from moe_jax.families.settings import HFConfig, Setting, key, resolve

HIDDEN_SIZE = key("hidden_size")
NUM_EXPERTS = key("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = key("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")

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

    intermediate_size: Setting
    num_experts: Setting = NUM_EXPERTS
    top_k: Setting = EXPERTS_PER_TOKEN
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
        """The layer's configuration; ValueError if its settings don't go together."""
        fields = ("intermediate_size", "num_experts", "top_k", "activation", "router", "shared_experts", "expert_bias")
        settings = resolve({"hidden_size": HIDDEN_SIZE, **{name: getattr(self, name) for name in fields}}, config)
        router, shared = settings.pop("router"), settings.pop("shared_experts")
        has_groups = self.group_limit is not None and resolve(self.limits_groups, config)
        groups = resolve(self.group_limit, config) if has_groups else None
        try:
            return MoEConfig(
                router=RouterConfig(**router, group_limit=None if groups is None else GroupLimit(**groups)),
                shared_experts=SharedExpertsConfig(**shared) if shared and shared["intermediate_size"] else None,
                **settings,
            )
        except ValueError as error:
            given = ", ".join(
                f"{name}={config[name]}" for name in (*NUM_EXPERTS.names, *EXPERTS_PER_TOKEN.names) if name in config
            )
            raise ValueError(f"config.json: MoE layers with {given} are not possible: {error}") from error


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
            max_positions=max_positions(config, self.attention.rope),
        )

    def _dense(self, config: HFConfig) -> DenseFeedForward:
        return DenseFeedForward(
            intermediate_size=resolve(self.dense_intermediate_size, config),
            activation=hidden_activation(config),
            bias=resolve(self.dense_bias, config),
        )
