"""Mixture-of-Experts layers for JAX that behave exactly like vLLM's."""
