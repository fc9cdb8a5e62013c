"""The attention of a family as a row of settings: grouped-query or latent."""

import dataclasses
from collections.abc import Callable

from moe_jax.families.decoder import Attention, GroupedQueryAttention, LatentAttention
from moe_jax.families.layer_plans import NUM_LAYERS, PerLayer, every_layer
from moe_jax.families.rope import RopeRow, latent_attention_scale, read_rope
from moe_jax.families.settings import HFConfig, Setting, key, resolve

NUM_HEADS = key("num_attention_heads")


def even_head_dim(config: HFConfig) -> int:
    """The hidden size split evenly over the heads."""
    return resolve(key("hidden_size"), config) // resolve(NUM_HEADS, config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQueryRow:
    """Settings of grouped-query attention."""

    num_heads: Setting = NUM_HEADS
    num_kv_heads: Setting = key("num_key_value_heads", null=NUM_HEADS)
    head_dim: Setting = key("head_dim", default=even_head_dim)
    qkv_bias: Setting = False
    output_bias: Setting = False
    qk_norm: Setting = None
    clip_qkv: Setting = None
    sinks: Setting = False
    sliding_window: Setting = None
    slides: Callable[[HFConfig], PerLayer] = every_layer
    """Which layers are limited to the sliding window, if there is one."""
    rope: RopeRow = RopeRow()

    def layers(self, config: HFConfig) -> tuple[Attention, ...]:
        """The attention of every layer; ValueError if numbers of heads don't go together, or a window holds nothing."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("slides", "rope")}
        fields = resolve(settings, config)
        if fields["num_heads"] % fields["num_kv_heads"]:
            raise ValueError(
                f"config.json: num_key_value_heads must divide num_attention_heads={fields['num_heads']}, "
                f"got {fields['num_kv_heads']}"
            )
        window, head_dim = fields.pop("sliding_window"), fields["head_dim"]
        if window == 0:
            raise ValueError("config.json: sliding_window must be at least 1, or null for none; got 0")
        rope = read_rope(config, self.rope, head_dim=head_dim)
        full = GroupedQueryAttention(**fields, rope=rope, scale=head_dim**-0.5)
        sliding = dataclasses.replace(full, sliding_window=window)
        return tuple(sliding if slides else full for slides in self.slides(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRow:
    """Settings of multi-head latent attention."""

    num_heads: Setting = NUM_HEADS
    q_lora_rank: Setting = key("q_lora_rank", null=None)
    kv_lora_rank: Setting = key("kv_lora_rank")
    qk_nope_head_dim: Setting = key("qk_nope_head_dim")
    qk_rope_head_dim: Setting = key("qk_rope_head_dim")
    v_head_dim: Setting = key("v_head_dim")
    bias: Setting = key("attention_bias", default=False)
    interleaved: Setting = True
    """Rotary pairs are neighbours."""
    rope: RopeRow = RopeRow()

    def layers(self, config: HFConfig) -> tuple[Attention, ...]:
        """The attention of every layer."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rope"}
        fields = resolve(settings, config)
        rope = read_rope(config, self.rope, head_dim=fields["qk_rope_head_dim"], interleaved=fields.pop("interleaved"))
        head_dim = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
        scale = latent_attention_scale(config, self.rope, head_dim=head_dim)
        return (LatentAttention(**fields, rope=rope, scale=scale),) * resolve(NUM_LAYERS, config)
