"""The block switches of a family as one row of settings, and how a row and a `config.json` make a `Decoder`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import GroupLimit, MoEConfig, RouterConfig, SharedExpertsConfig
from moe_jax.families.config_keys import check_keys
from moe_jax.families.decoder import Attention, Decoder, DenseFeedForward, GroupedQueryAttention, Layer
from moe_jax.families.rope import read_rope
from moe_jax.families.settings import HFConfig, Setting, key, resolve
from moe_jax.kernels import Activation

HIDDEN_SIZE = key("hidden_size")
NUM_LAYERS = key("num_hidden_layers")
ACTIVATION = key("hidden_act", default="silu")


def every_layer(config: HFConfig) -> tuple[bool, ...]:
    """Every layer has a Mixture of Experts."""
    return (True,) * resolve(NUM_LAYERS, config)


def sparse_step(config: HFConfig) -> tuple[bool, ...]:
    """Qwen's rule: every `decoder_sparse_step`-th layer, except `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(resolve(NUM_LAYERS, config)))


def first_dense(config: HFConfig) -> tuple[bool, ...]:
    """DeepSeek's rule: all but the first `first_k_dense_replace` layers."""
    return tuple(i >= config.get("first_k_dense_replace", 0) for i in range(resolve(NUM_LAYERS, config)))


def full_attention(config: HFConfig) -> tuple[bool, ...]:
    """No layer's attention is limited to the sliding window."""
    return (False,) * resolve(NUM_LAYERS, config)


def sliding_attention(config: HFConfig) -> tuple[bool, ...]:
    """Every layer's attention is limited to the sliding window, if there is one."""
    return (True,) * resolve(NUM_LAYERS, config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQueryRow:
    """Settings of grouped-query attention."""

    num_heads: Setting = key("num_attention_heads")
    num_kv_heads: Setting = key("num_key_value_heads", default=lambda c: c["num_attention_heads"])
    head_dim: Setting = key("head_dim", default=lambda c: c["hidden_size"] // c["num_attention_heads"])
    qkv_bias: Setting = False
    output_bias: Setting = False
    qk_norm: Setting = None
    clip_qkv: Setting = None
    sinks: Setting = False
    rotary_fraction: Setting = 1.0
    sliding_window: Setting = None
    slides: Callable[[HFConfig], tuple[bool, ...]] = sliding_attention
    """Which layers are limited to the sliding window."""

    def layers(self, config: HFConfig, rope_theta: float) -> tuple[Attention, ...]:
        """The attention of every layer."""
        row = resolve({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "slides"}, config)
        window, fraction = row.pop("sliding_window"), row.pop("rotary_fraction")
        rope = read_rope(config, rotary_dim=int(row["head_dim"] * fraction), default_theta=rope_theta)
        attention = GroupedQueryAttention(**row, rope=rope, scale=row["head_dim"] ** -0.5)
        slides = dataclasses.replace(attention, sliding_window=window)
        return tuple(slides if sliding else attention for sliding in self.slides(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureRow:
    """Settings of the Mixture-of-Experts layers."""

    num_experts: Setting
    intermediate_size: Setting
    top_k: Setting = key("num_experts_per_tok")
    activation: Setting = ACTIVATION
    router: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    """Fields of `RouterConfig`."""
    group_limit: Mapping[str, Setting] | None = None
    """Fields of `GroupLimit`."""
    limits_groups: Setting = True
    """Whether `group_limit` applies."""
    shared_experts: Mapping[str, Setting] | None = None
    """Fields of `SharedExpertsConfig`; an intermediate size of 0 means none."""
    expert_bias: Setting = False
    where: Callable[[HFConfig], tuple[bool, ...]] = every_layer
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

    attention: Any
    """A row with a method `layers(config, rope_theta)`: the attention of every layer."""
    mixture: MixtureRow
    rope_theta: float = 10000.0
    """Base of the rotary frequencies when `config.json` doesn't say."""
    norm_epsilon: Setting = key("rms_norm_eps")
    dense_intermediate_size: Setting = key("intermediate_size", default=None)
    tie_word_embeddings: Setting = key("tie_word_embeddings", default=False)
    refused: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Keys that change the result -> the values (besides null) under which they don't."""
    read: tuple[str, ...] = ()
    """Keys that the row's functions read, beside its settings."""
    ignored: tuple[str, ...] = ()
    """Keys of this family that never change what is computed."""

    def __call__(self, config: HFConfig) -> Decoder:
        """Raises ValueError naming every key that changes the result and isn't supported, KeyError for a missing one."""
        check_keys(self, config)
        mixture = self.mixture.build(config)
        dense = DenseFeedForward(
            intermediate_size=resolve(self.dense_intermediate_size, config) or mixture.intermediate_size,
            activation=Activation.of(resolve(ACTIVATION, config)).name,
        )
        layers = tuple(
            Layer(attention=attention, feed_forward=mixture if sparse else dense)
            for attention, sparse in zip(
                self.attention.layers(config, self.rope_theta), self.mixture.where(config), strict=True
            )
        )
        return Decoder(
            vocab_size=resolve(key("vocab_size"), config),
            hidden_size=resolve(HIDDEN_SIZE, config),
            layers=layers,
            norm_epsilon=resolve(self.norm_epsilon, config),
            tie_word_embeddings=resolve(self.tie_word_embeddings, config),
            max_positions=resolve(key("max_position_embeddings"), config),
        )
