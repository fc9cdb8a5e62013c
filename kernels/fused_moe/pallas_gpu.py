"""The fused MoE block by Mosaic GPU kernels, on Hopper and Blackwell: what they support; `pallas_gpu_block.py` computes."""

import jax.numpy as jnp
from jax import Array

from ..mosaic_gpu.limits import unsupported_device, unsupported_operands
from ..selection import Formulation
from .assignment import Assignment
from .expert_block import ExpertWeights
from .request import Request

NAME = "pallas_gpu"


def unsupported(request: Request) -> str | None:
    """Devices other than Hopper and Blackwell, dtypes other than bfloat16 and float16, rows that no bulk copy can address."""
    return unsupported_device(request.gpu, request.platform) or unsupported_operands(
        request.x.dtype, H=request.hidden_size, I=request.intermediate_size
    )


def formulation(request: Request) -> Formulation:
    """Kernels and tiles of the forward pass."""
    from .pallas_gpu_block import chosen_kernels  # Mosaic GPU takes half a second to import

    num_pairs = request.num_tokens * request.top_k
    kernel, gate_up, down = chosen_kernels(num_pairs, request.gate_up_proj.shape, request.x.dtype, request.gpu)
    return Formulation(
        f"{kernel} kernel, gate/up {gate_up.tiles}, down {down.tiles}",
        f"gate/up: {gate_up.reason}; down: {down.reason}",
    )


def run(request: Request) -> Array:
    """Compute; differentiable in everything floating."""
    from .pallas_gpu_block import AlignedRows, Computation, compute

    if request.x.size == 0 or request.intermediate_size == 0:
        return jnp.zeros_like(request.x)
    assignment = Assignment.of(request.topk_ids, request.expert_offset, request.num_experts)
    aligned = AlignedRows.of(assignment, request.num_experts)
    topk_weights = jnp.where(aligned.is_local, request.topk_weights.astype(jnp.float32), 0)
    weights = ExpertWeights(request.gate_up_proj, request.down_proj, request.gate_up_bias, request.down_bias)
    computation = Computation(
        request.gpu, request.activation, request.apply_router_weight_on_input, request.recompute_activation
    )
    return compute(computation, request.x, topk_weights, weights, aligned)
