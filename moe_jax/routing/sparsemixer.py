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
    pick's weight is its softmax probability among the rest; then the pick itself drops out and the second one is made. A logit
    of -inf takes no part: it is picked only if nothing else is left, and weighs 0.

    Args:
      logits: router logits, float32.
      jitter: half the relative distance within which an expert still competes (`router_jitter_noise`, 0.01).
      forced_ids: take these experts instead of the best; one that had dropped out weighs 0, as does -1.

    Source: SparseMixer (arXiv 2310.00811), vLLM `phimoe_routing_function`; spec 2.7.
    """
    is_taken = jnp.zeros(logits.shape, bool)
    weights, ids = [], []
    for pick in range(2):
        # The smallest float, not -inf: an expert that cannot compete still comes before one that was picked.
        remaining = jnp.where(is_taken, -jnp.inf, jnp.maximum(logits, jnp.finfo(logits.dtype).min))
        chosen = remaining.argmax(axis=-1) if forced_ids is None else forced_ids[:, pick]
        chosen = chosen.astype(jnp.int32)[:, None]
        best = remaining.max(axis=-1, keepdims=True)
        distance = (best - logits) / jnp.maximum(jnp.abs(logits), best)
        is_close = ~(jax.lax.stop_gradient(distance) > 2 * jitter) & ~jnp.isneginf(logits) & ~is_taken
        probabilities = jax.nn.softmax(jnp.where(is_close, logits, jnp.finfo(logits.dtype).min), axis=-1)
        weights.append(gather_per_expert(jnp.where(is_close, probabilities, 0.0), chosen))
        ids.append(chosen)
        is_taken = is_taken | (jnp.arange(logits.shape[-1]) == chosen)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(ids, axis=-1)
