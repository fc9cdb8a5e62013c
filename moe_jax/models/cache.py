"""The key/value cache: preallocated arrays and how many tokens each row holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.families.decoder import Attention, Decoder, GroupedQueryAttention
from moe_jax.models.scan_plan import Segment

LayerCache = tuple[Float[Array, "B slots *features"], ...]
"""What one layer keeps per token: keys `[kv_heads, head_dim]` and values, or latent attention's compressed `[rank + rope]`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of earlier tokens. Slot i of a row holds that row's i-th real token; padding is never stored."""

    segments: tuple[tuple[LayerCache, ...], ...]
    """Per segment of the scan plan and position in its group: arrays `[repeats, B, slots, *features]`."""
    lengths: Int[Array, "B"]
    """Real tokens held per row."""

    @property
    def max_length(self) -> int:
        """Slots per row. A row that outgrows them gets NaN logits, because its first tokens are kept and others lost."""
        return self.segments[0][0][0].shape[2]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.lengths.shape[0]


def init_cache(decoder: Decoder, plan: tuple[Segment, ...], *, batch_size: int, max_length: int, dtype: Any) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_length` tokens."""
    segments = tuple(
        tuple(
            tuple(
                jnp.zeros((segment.repeats, batch_size, max_length, *features), dtype)
                for features in cached_features(decoder.layers[segment.start + position].attention)
            )
            for position in range(segment.period)
        )
        for segment in plan
    )
    return KVCache(segments, jnp.zeros(batch_size, jnp.int32))


def cached_features(attention: Attention) -> tuple[tuple[int, ...], ...]:
    """Shape of what is kept per token: key and value heads, or one compressed vector."""
    if isinstance(attention, GroupedQueryAttention):
        return ((attention.num_kv_heads, attention.head_dim),) * 2
    return ((attention.kv_lora_rank + attention.qk_rope_head_dim,),)


def store(cache: LayerCache, new: LayerCache, slots: Int[Array, "B S"]) -> LayerCache:
    """Write the new tokens into their slots; slots outside of the cache are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return tuple(
        held.at[rows, slots].set(values.astype(held.dtype), mode="drop")
        for held, values in zip(cache, new, strict=True)
    )
