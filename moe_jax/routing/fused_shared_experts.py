"""Fused shared experts: every token visits them, as extra choices behind the routed ones."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def fused_shared_expert_weight(routed_scaling_factor: float, *, apply_scale_to_output: bool) -> float:
    """Weight of a fused shared expert's choice, such that it counts once after all scaling (spec 1.3).

    Its output is summed with the routed one, so a factor that will be applied to that sum is divided out here.
    """
    return 1.0 / routed_scaling_factor if apply_scale_to_output else 1.0


def append_fused_shared_experts(
    topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"], *, first_id: int, count: int, weight: float
) -> tuple[Float[Array, "T K+S"], Int[Array, "T K+S"]]:
    """Append the ids `first_id .. first_id + count - 1`, each with `weight`, to every token's experts.

    To be called on finished weights: the shared choices take no part in renormalisation or the router's scaling.

    Source: vLLM `fused_topk_bias`; spec 2.5.
    """
    num_tokens = topk_ids.shape[0]
    shared_ids = jnp.broadcast_to(first_id + jnp.arange(count, dtype=topk_ids.dtype), (num_tokens, count))
    shared_weights = jnp.full((num_tokens, count), weight, topk_weights.dtype)
    return (
        jnp.concatenate([topk_weights, shared_weights], axis=-1),
        jnp.concatenate([topk_ids, shared_ids], axis=-1),
    )
