"""The fused MoE block with experts split over a mesh axis; see `api.py`."""

from .api import expert_parallel_moe, explain_expert_parallel_moe
from .exchange import BLOCK_ALIGNMENT

__all__ = ["BLOCK_ALIGNMENT", "expert_parallel_moe", "explain_expert_parallel_moe"]
