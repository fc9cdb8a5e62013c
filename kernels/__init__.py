"""Expert computation: grouped matmuls and the fused MoE block, one folder per op."""

from .activations import ACTIVATIONS, Activation
from .expert_parallel import expert_parallel_moe, explain_expert_parallel_moe
from .fused_moe import explain_fused_moe, fused_moe
from .grouped_matmul import explain_grouped_matmul, grouped_matmul
from .selection import Choice

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Choice",
    "expert_parallel_moe",
    "explain_expert_parallel_moe",
    "explain_fused_moe",
    "explain_grouped_matmul",
    "fused_moe",
    "grouped_matmul",
]
