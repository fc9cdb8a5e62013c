"""The key/value cache: preallocated arrays and how many tokens each row holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from moe_jax.families.decoder import Attention, Decoder, GroupedQueryAttention
from moe_jax.models.partitioning import Partitioning
from moe_jax.models.scan_plan import Segment

CacheArrays = tuple[Float[Array, "repeats B slots *features"], ...]
"""What a stack's layers keep: keys `[kv_heads, head_dim]` and values, or latent attention's vector `[rank + rope]`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of earlier tokens. Slot i of a row holds that row's i-th real token; padding is never stored."""

    segments: tuple[tuple[CacheArrays, ...], ...]
    """Per segment of the scan plan and position in its group."""
    lengths: Int[Array, "B"]
    """Real tokens held per row."""

    @property
    def max_length(self) -> int:
        """Slots per row. A row that outgrows them gets NaN logits, for its last tokens have no place."""
        return self.segments[0][0][0].shape[2]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.lengths.shape[0]


def init_cache(
    decoder: Decoder,
    plan: tuple[Segment, ...],
    *,
    batch_size: int,
    max_length: int,
    dtype: Any,
    partitioning: Partitioning | None = None,
) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_length` tokens, split as `partitioning` says."""
    if max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")

    def empty(repeats: int, features: tuple[int, ...]) -> jax.Array:
        shape = (repeats, batch_size, max_length, *features)
        if partitioning is None:
            return jnp.zeros(shape, dtype)
        sharding = NamedSharding(partitioning.mesh, partitioning.cache_spec(features, batch_size))
        # Outside of `jax.jit` the first puts the array there, inside the second does.
        return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype, device=sharding), sharding)

    segments = tuple(
        tuple(
            tuple(
                empty(segment.repeats, features)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's part of the arrays of its stack.

    The arrays stay whole, so that a scan can carry them and a layer writes only its new tokens, in place.
    """

    arrays: CacheArrays
    """What all layers of the stack keep."""
    layer: Int[Array, ""]
    """Index of this layer."""

    def store(self, *new: Float[Array, "B S *features"], slots: Int[Array, "B S"]) -> "LayerCache":
        """The cache with new tokens in their slots; those whose slot is outside of it are dropped."""
        layer = jnp.broadcast_to(self.layer, slots.shape)
        where = jnp.stack([layer, slots], axis=-1)
        arrays = tuple(
            _store_rows(held, values.astype(held.dtype), where) for held, values in zip(self.arrays, new, strict=True)
        )
        return LayerCache(arrays, self.layer)

    def read(self, dtype: Any) -> tuple[Float[Array, "B slots *features"], ...]:
        """All slots of this layer, in `dtype`."""
        return tuple(held[self.layer].astype(dtype) for held in self.arrays)


def _store_rows(
    held: Float[Array, "repeats B slots *features"],
    values: Float[Array, "B S *features"],
    where: Int[Array, "B S 2"],
) -> Float[Array, "repeats B slots *features"]:
    """`held` with `values[b, s]` at `held[layer, b, slot]`, `where[b, s]` being `(layer, slot)`.

    The rows are a batch dimension of the scatter, not an index: so the compiler sees that a batch split over devices
    needs no values of other devices.
    """
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, values.ndim)),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(held, where, values, dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)
