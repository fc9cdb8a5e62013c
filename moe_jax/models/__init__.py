"""Causal language models assembled from a family's `Decoder` description."""

from moe_jax.models.cache import KVCache
from moe_jax.models.causal_lm import CausalLM

__all__ = ["CausalLM", "KVCache"]
