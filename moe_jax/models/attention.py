"""Grouped-query attention in all the variants that a `GroupedQueryAttention` description can have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.families.decoder import GroupedQueryAttention, Rope
from moe_jax.models.cache import LayerCache
from moe_jax.models.rotary import Rotation, rotate
from moe_jax.models.sequence import Visibility
from moe_jax.models.softmax_attention import attend_in_blocks


class AttentionInputs(NamedTuple):
    """What all layers share in a call, computed once."""

    rotations: Mapping[Rope, Rotation]
    """Angles of every kind of rotary embedding in the decoder."""
    visibility: Mapping[int | None, Visibility]
    """Which keys each token sees, by sliding window."""
    slots: Int[Array, "B S"]
    """Where a cache stores the new tokens."""


class MultiHeadAttention(nnx.Module):
    """Projections, optional norms and clipping, rotary embedding, attention, output projection.

    Children: `q_proj`, `k_proj`, `v_proj`, `o_proj` (`nnx.Linear`); `q_norm`, `k_norm` and `sinks` `[N]`, or None.
    """

    def __init__(
        self,
        description: GroupedQueryAttention,
        *,
        hidden_size: int,
        norm_epsilon: float,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        """Create the parameters in `param_dtype`; computation is in `dtype`."""
        self.description = description
        queries = description.num_heads * description.head_dim
        keys = description.num_kv_heads * description.head_dim
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.q_proj = nnx.Linear(hidden_size, queries, use_bias=description.qkv_bias, **dtypes)
        self.k_proj = nnx.Linear(hidden_size, keys, use_bias=description.qkv_bias, **dtypes)
        self.v_proj = nnx.Linear(hidden_size, keys, use_bias=description.qkv_bias, **dtypes)
        self.o_proj = nnx.Linear(queries, hidden_size, use_bias=description.output_bias, **dtypes)

        def norm(projection: int) -> nnx.RMSNorm | None:
            if description.qk_norm is None:
                return None
            size = description.head_dim if description.qk_norm == "head" else projection
            return nnx.RMSNorm(size, epsilon=norm_epsilon, **dtypes)

        self.q_norm = nnx.data(norm(queries))
        self.k_norm = nnx.data(norm(keys))
        sinks = jnp.zeros(description.num_heads, param_dtype)
        self.sinks = nnx.data(nnx.Param(sinks) if description.sinks else None)

    def __call__(
        self, x: Float[Array, "B S H"], inputs: AttentionInputs, cache: LayerCache | None
    ) -> tuple[Float[Array, "B S H"], LayerCache | None]:
        """Attend to the new tokens and to those in the cache; returns the cache with the new ones added."""
        description = self.description
        query = self._heads(self.q_proj(x), self.q_norm)
        key = self._heads(self.k_proj(x), self.k_norm)
        value = self._heads(self.v_proj(x), None)
        turn = inputs.rotations[description.rope]
        query, key = rotate(query, description.rope, turn), rotate(key, description.rope, turn)
        if cache is not None:
            cache = cache.store(key, value, slots=inputs.slots)
            key, value = cache.read(query.dtype)
        output = attend_in_blocks(
            query,
            key,
            value,
            inputs.visibility[description.sliding_window],
            scale=description.scale,
            sinks=None if self.sinks is None else self.sinks[...],
        )
        return self.o_proj(output.reshape(*x.shape[:-1], -1)), cache

    def _heads(self, projected: Float[Array, "B S N*D"], norm: nnx.RMSNorm | None) -> Float[Array, "B S N D"]:
        """Normalise, clip and split into heads."""
        if norm is not None and self.description.qk_norm == "projection":
            projected = norm(projected)
        if self.description.clip_qkv is not None:
            projected = jnp.clip(projected, -self.description.clip_qkv, self.description.clip_qkv)
        heads = projected.reshape(*projected.shape[:-1], -1, self.description.head_dim)
        if norm is not None and self.description.qk_norm == "head":
            heads = norm(heads)
        return heads
