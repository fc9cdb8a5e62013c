"""Sparsemixer: two experts per token, each weighed among the experts that come close to it (PhiMoE)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .weights import gather_per_expert


def sparsemixer(
    logits: Float[Array, "T E"], *, jitter: float, forced_ids: Int[Array, "T 2"] | None = None
) -> tuple[Float[Array, "T 2"], Int[Array, "T 2"]]:
    """Two experts per token and their weights, which do not sum to 1.

    For each pick the experts whose logit lies further than `2 * jitter` (relative) below the best one drop out, and the
    pick's weight is its softmax probability among the rest; then the pick itself drops out and the second one is made.

    Args:
      logits: router logits, float32.
      jitter: half the relative distance within which an expert still competes (`router_jitter_noise`, 0.01).
      forced_ids: take these experts instead of the best; one that had dropped out weighs 0, as does -1.

    Source: SparseMixer (arXiv 2310.00811), vLLM `phimoe_routing_function`; spec 2.7.
    """
    remaining = logits
    weights, ids = [], []
    for pick in range(2):
        best = remaining.max(axis=-1, keepdims=True)
        distance = (best - logits) / jnp.maximum(jnp.abs(logits), best)
        competing = jnp.where(jax.lax.stop_gradient(distance) > 2 * jitter, -jnp.inf, remaining)
        chosen = remaining.argmax(axis=-1) if forced_ids is None else forced_ids[:, pick]
        chosen = chosen.astype(jnp.int32)[:, None]
        weights.append(gather_per_expert(jax.nn.softmax(competing, axis=-1), chosen))
        ids.append(chosen)
        remaining = jnp.where(jnp.arange(logits.shape[-1]) == chosen, -jnp.inf, remaining)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(ids, axis=-1)
