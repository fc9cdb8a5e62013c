"""The fused MoE block with experts split over a mesh axis; see `api.py`."""

from .api import expert_parallel_moe, explain_expert_parallel_moe

__all__ = ["expert_parallel_moe", "explain_expert_parallel_moe"]
