"""What a decoder-only language model is made of: the data that a family row and a `config.json` turn into."""

import dataclasses
from typing import Literal

from moe_jax.config import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by a constant (rope_type "linear")."""

    factor: float
    """How many times longer than in training sequences may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: low frequencies are interpolated, high ones kept (Peng et al. 2023, arXiv 2309.00071, section 3)."""

    factor: float
    """How many times longer than in training sequences may be."""
    original_max_positions: int
    """Sequence length of training."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original length are kept."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this over the original length are fully interpolated."""
    truncate: bool = True
    """Round the two borders to whole dimensions (gpt-oss doesn't)."""
    attention_factor: float = 1.0
    """Factor on cos and sin, already worked out from mscale where a family uses it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of one attention kind."""

    theta: float
    """Base of the frequencies."""
    rotary_dim: int
    """How many leading dimensions of a head are rotated."""
    interleaved: bool = False
    """Pairs are neighbours (2i, 2i+1) instead of halves (i, i + rotary_dim / 2)."""
    scaling: LinearScaling | YarnScaling | None = None
    """How the frequencies are stretched to longer sequences."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Attention in which several query heads share one key/value head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    """Factor on query-key products."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    """RMS norm of queries and keys before RoPE: per head (Qwen3), over the whole projection (OLMoE), or none."""
    clip_qkv: float | None = None
    """Clamp queries, keys and values to ± this (OLMoE)."""
    sliding_window: int | None = None
    """A query sees this many positions, itself included."""
    sinks: bool = False
    """A learned logit per head takes part in the softmax and is dropped after it (gpt-oss)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    num_heads: int
    q_lora_rank: int | None
    """Width of the compressed query; None: queries are projected directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope
    scale: float
    """Factor on query-key products."""
    bias: bool = False
    """`attention_bias`: the down projections and the output projection have biases."""
    norm_epsilon: float = 1e-6
    """Of the norms of the compressed query, key and value, which `rms_norm_eps` doesn't reach (as in Hugging Face)."""


Attention = GroupedQueryAttention | LatentAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseFeedForward:
    """An ordinary gated MLP."""

    intermediate_size: int
    activation: str
    bias: bool = False
    """The three projections have biases."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One pre-norm decoder layer."""

    attention: Attention
    feed_forward: DenseFeedForward | MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only causal language model."""

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm_epsilon: float
    tie_word_embeddings: bool = False
    """Logits are computed with the embedding table."""
    max_positions: int
    """Longest sequence the checkpoint promises to handle."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose feed-forward part is a Mixture of Experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoEConfig))
