"""The fused MoE block with experts split over a mesh axis; see `api.py`."""

from .api import expert_parallel_moe, explain

__all__ = ["expert_parallel_moe", "explain"]
