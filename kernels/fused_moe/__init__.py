"""The experts of a Mixture-of-Experts block in one op. `api.py` is the contract; one file per implementation."""

from .api import explain_fused_moe, fused_moe

__all__ = ["explain_fused_moe", "fused_moe"]
