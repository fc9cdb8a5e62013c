"""Choosing experts: the best few per token, ties to the lowest id, optionally out of the best groups only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import GroupLimit


def top_k_lowest_index(values: Float[Array, "T E"], k: int) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """The `k` largest values of each row, largest first, with their positions; equal values go to the lowest position.

    `jax.lax.top_k` keeps the order of equal values but takes `-0.0` to be less than `0.0`, and NaNs of either sign to be the
    largest or the least, so both are made alike first. A NaN counts as larger than everything, which shows in the weights;
    positions are in range and distinct whatever the values are.
    """
    alike = jnp.where(jnp.isnan(values), jnp.nan, jnp.where(values == 0, 0.0, values))
    return jax.lax.top_k(alike, k)


def keep_best_groups(choice: Float[Array, "T E"], limit: GroupLimit) -> Float[Array, "T E"]:
    """`choice` with the experts outside each token's best groups set to `limit.masked_score`.

    Experts `g * E / G .. (g + 1) * E / G - 1` form group `g`. Equal groups: the lower one is kept.

    Raises:
        ValueError: `limit` leaves open how groups are scored.

    Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; vLLM `grouped_topk`; spec 2.6.
    """
    num_tokens, num_experts = choice.shape
    grouped = choice.reshape(num_tokens, limit.num_groups, num_experts // limit.num_groups)
    if limit.score is None:
        raise ValueError("limit.score must be 'max' or 'top2_sum', got None: see RouterConfig.scored_group_limit")
    experts_counted = 1 if limit.score == "max" else 2
    group_scores = top_k_lowest_index(grouped, experts_counted)[0].sum(axis=-1)
    _, kept_groups = top_k_lowest_index(group_scores, limit.groups_kept)
    is_kept = (kept_groups[..., None] == jnp.arange(limit.num_groups)).any(axis=-2)
    return jnp.where(is_kept[..., None], grouped, limit.masked_score).reshape(choice.shape)


def choose_experts(
    scores: Float[Array, "T E"],
    *,
    top_k: int,
    correction_bias: Float[Array, "E"] | None = None,
    group_limit: GroupLimit | None = None,
) -> Int[Array, "T K"]:
    """Ids of the `top_k` best experts per token, best first, int32; ties go to the lowest id.

    `correction_bias` steers the choice only: no weights come out of here, so it cannot leak into them. The choice has
    no gradient.

    Source: vLLM `fused_topk`, `fused_topk_bias`, `grouped_topk`; spec 2.4–2.6.
    """
    choice = scores if correction_bias is None else scores + correction_bias
    choice = jax.lax.stop_gradient(choice)
    if group_limit is not None:
        choice = keep_best_groups(choice, group_limit)
    return top_k_lowest_index(choice, top_k)[1].astype(jnp.int32)
