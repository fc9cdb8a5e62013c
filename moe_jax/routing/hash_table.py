"""Hash routing: the token id alone decides which experts a token visits (first layers of DeepSeek-V4)."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def look_up_experts(hash_table: Int[Array, "V K"], input_ids: Int[Array, "T"]) -> Int[Array, "T K"]:
    """Row `input_ids[t]` of the table, int32; a token id outside the table (padding) gets no expert, -1.

    Source: vLLM `fused_topk_bias` with `hash_indices_table`; spec 2.5.
    """
    vocabulary = hash_table.shape[0]
    input_ids = input_ids.astype(jnp.promote_types(input_ids.dtype, jnp.int32))  # int16 may not hold `vocabulary`
    rows = jnp.where(input_ids < 0, vocabulary, input_ids)  # a negative index would count from the table's end
    return hash_table.at[rows].get(mode="fill", fill_value=-1).astype(jnp.int32)


def default_hash_table(vocabulary: int, num_experts: int, top_k: int) -> Int[Array, "V K"]:
    """A legal table to start from: `top_k` distinct experts per token id, every expert equally often (nearly)."""
    first = jnp.arange(vocabulary, dtype=jnp.int32)[:, None] * top_k
    return (first + jnp.arange(top_k, dtype=jnp.int32)) % num_experts
