"""Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values from one compressed vector."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.families.decoder import LatentAttention
from moe_jax.models.attention import AttentionInputs
from moe_jax.models.cache import LayerCache
from moe_jax.models.rotary import rotate
from moe_jax.models.sequence import Visibility
from moe_jax.models.softmax_attention import attend_in_blocks


class MultiHeadLatentAttention(nnx.Module):
    """Attention whose cache holds one compressed vector per token instead of keys and values of every head.

    The compressed vector is `[latent (kv_lora_rank), rotated key (qk_rope_head_dim)]`. Keys and values are the latent
    times `kv_b_proj`. Many queries expand all latents into keys and values; few queries are taken into the latents'
    space instead, which is the same product in another order and much less work in decoding.

    Children: `q_proj`, or `q_a_proj`, `q_a_norm`, `q_b_proj`; `kv_a_proj`, `kv_a_norm`, `kv_b_proj`, `o_proj`.
    """

    def __init__(self, description: LatentAttention, *, hidden_size: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        """Create the parameters in `param_dtype`; computation is in `dtype`."""
        self.description = description
        heads, rank, bias = description.num_heads, description.kv_lora_rank, description.bias
        queries = heads * (description.qk_nope_head_dim + description.qk_rope_head_dim)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        if description.q_lora_rank is None:
            self.q_proj = nnx.Linear(hidden_size, queries, use_bias=False, **dtypes)
        else:
            self.q_a_proj = nnx.Linear(hidden_size, description.q_lora_rank, use_bias=bias, **dtypes)
            self.q_a_norm = nnx.RMSNorm(description.q_lora_rank, epsilon=description.norm_epsilon, **dtypes)
            self.q_b_proj = nnx.Linear(description.q_lora_rank, queries, use_bias=False, **dtypes)
        self.kv_a_proj = nnx.Linear(hidden_size, rank + description.qk_rope_head_dim, use_bias=bias, **dtypes)
        self.kv_a_norm = nnx.RMSNorm(rank, epsilon=description.norm_epsilon, **dtypes)
        keys_and_values = heads * (description.qk_nope_head_dim + description.v_head_dim)
        self.kv_b_proj = nnx.Linear(rank, keys_and_values, use_bias=False, **dtypes)
        self.o_proj = nnx.Linear(heads * description.v_head_dim, hidden_size, use_bias=bias, **dtypes)

    def __call__(
        self, x: Float[Array, "B S H"], inputs: AttentionInputs, cache: LayerCache | None
    ) -> tuple[Float[Array, "B S H"], LayerCache | None]:
        """Attend to the new tokens and to those in the cache; returns the cache with the new ones added."""
        description = self.description
        turn = inputs.rotations[description.rope]
        query = self._queries(x).reshape(*x.shape[:-1], description.num_heads, -1)
        unrotated, rotated = jnp.split(query, [description.qk_nope_head_dim], axis=-1)
        rotated = rotate(rotated, description.rope, turn)

        latent, rotated_key = jnp.split(self.kv_a_proj(x), [description.kv_lora_rank], axis=-1)
        rotated_key = rotate(rotated_key[:, :, None], description.rope, turn)[:, :, 0]
        compressed = jnp.concatenate([self.kv_a_norm(latent), rotated_key], axis=-1)
        if cache is not None:
            cache = cache.store(compressed, slots=inputs.slots)
            (compressed,) = cache.read(x.dtype)

        visibility = inputs.visibility[None]
        if latent_space_is_cheaper(description, queries=x.shape[1], keys=compressed.shape[1]):
            output = self._attend_in_latent_space(unrotated, rotated, compressed, visibility)
        else:
            output = self._attend_expanded(unrotated, rotated, compressed, visibility)
        return self.o_proj(output.reshape(*x.shape[:-1], -1)), cache

    def _queries(self, x: Float[Array, "B S H"]) -> Float[Array, "B S N*D"]:
        if self.description.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))

    def _attend_expanded(
        self,
        unrotated: Float[Array, "B S N P"],
        rotated: Float[Array, "B S N R"],
        compressed: Float[Array, "B T C+R"],
        visibility: Visibility,
    ) -> Float[Array, "B S N V"]:
        description = self.description
        latent, rotated_key = jnp.split(compressed, [description.kv_lora_rank], axis=-1)
        expanded = self.kv_b_proj(latent).reshape(*latent.shape[:-1], description.num_heads, -1)
        key, value = jnp.split(expanded, [description.qk_nope_head_dim], axis=-1)
        shared = jnp.broadcast_to(rotated_key[:, :, None], (*key.shape[:-1], rotated_key.shape[-1]))
        query = jnp.concatenate([unrotated, rotated], axis=-1)
        key = jnp.concatenate([key, shared], axis=-1)
        return attend_in_blocks(query, key, value, visibility, scale=description.scale)

    def _attend_in_latent_space(
        self,
        unrotated: Float[Array, "B S N P"],
        rotated: Float[Array, "B S N R"],
        compressed: Float[Array, "B T C+R"],
        visibility: Visibility,
    ) -> Float[Array, "B S N V"]:
        description = self.description
        weight = self.kv_b_proj.kernel[...].astype(unrotated.dtype)
        weight = weight.reshape(description.kv_lora_rank, description.num_heads, -1)
        to_key, to_value = jnp.split(weight, [description.qk_nope_head_dim], axis=-1)
        query = jnp.concatenate([jnp.einsum("bsnp,cnp->bsnc", unrotated, to_key), rotated], axis=-1)
        shared = compressed[:, :, None]  # key and value of every head
        mixed = attend_in_blocks(query, shared, shared, visibility, scale=description.scale)
        return jnp.einsum("bsnc,cnv->bsnv", mixed[..., : description.kv_lora_rank], to_value)


def latent_space_is_cheaper(description: LatentAttention, *, queries: int, keys: int) -> bool:
    """Whether taking the queries into the latents' space costs fewer multiplications than expanding all latents.

    Per head, expanding costs `keys * rank * (P + V)` and then `queries * keys * (P + R + V)`; the latents' space costs
    `queries * rank * (P + V)` and then `queries * keys * (2 * rank + 2 * R)`.
    """
    rank, rope = description.kv_lora_rank, description.qk_rope_head_dim
    head = description.qk_nope_head_dim + description.v_head_dim
    expanded = keys * rank * head + queries * keys * (head + rope)
    in_latent_space = queries * rank * head + 2 * queries * keys * (rank + rope)
    return in_latent_space < expanded
