"""Zero experts: ids from `num_experts` upwards return the token unchanged, times their weight (LongCat-Flash)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class ZeroExpertSplit(NamedTuple):
    """The routed part of a routing result, and the weight that the token itself gets."""

    topk_weights: Float[Array, "T K"]
    """Weights, 0 where the choice was a zero expert."""
    topk_ids: Int[Array, "T K"]
    """Ids, `placeholder_id` where the choice was a zero expert."""
    identity_weight: Float[Array, "T"]
    """Sum of the zero experts' weights: the output owes `identity_weight[:, None] * hidden_states`."""


def split_zero_experts(
    topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"], *, num_experts: int, placeholder_id: int = -1
) -> ZeroExpertSplit:
    """Separate the choices with ids >= `num_experts` from those that name a real expert.

    vLLM gives such a choice to expert 0 with weight 0; here it is -1 unless `placeholder_id` says otherwise, so that no
    expert computes rows that count for nothing.

    Args:
        topk_weights: router weights of all choices.
        topk_ids: ids of real experts, below `num_experts`, and of zero experts, from there upwards.
        num_experts: E, real experts.
        placeholder_id: what takes the place of a zero expert's id.

    Returns:
        Weights and ids for the routed experts, and what each token is to be multiplied by; no choice counts in both.

    Source: vLLM `ZeroExpertRouter`; spec 2.8.
    """
    is_zero_expert = topk_ids >= num_experts
    return ZeroExpertSplit(
        topk_weights=jnp.where(is_zero_expert, 0.0, topk_weights),
        topk_ids=jnp.where(is_zero_expert, placeholder_id, topk_ids),
        identity_weight=jnp.where(is_zero_expert, topk_weights, 0.0).sum(axis=-1),
    )
