"""The experts of a Mixture-of-Experts block in one op. `api.py` is the contract; one file per implementation."""

from .api import IMPLEMENTATION_NAMES, explain_fused_moe, fused_moe

__all__ = ["IMPLEMENTATION_NAMES", "explain_fused_moe", "fused_moe"]
