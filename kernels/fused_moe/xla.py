"""The fused MoE block from ordinary XLA operations. For CPUs, and any accelerator without a kernel."""

import jax.numpy as jnp
from jax import Array

from ..grouped_matmul.xla import multiply_groups, tiling_for
from ..selection import Formulation
from ..varying import equally_varying
from .assignment import Assignment, combine_rows, gather_rows
from .request import Request

NAME = "xla"


def unsupported(request: Request) -> str | None:
    """Nothing is."""
    return None


def formulation(request: Request) -> Formulation:
    """One loop; its sizes follow from the shapes."""
    tiling = tiling_for(request.num_tokens * request.top_k, request.num_experts, request.platform)
    return Formulation(f"loop over {tiling.describe()}", "shapes")


def run(request: Request) -> Array:
    """Sort, gate/up, activation, down, combine."""
    x = request.x
    num_experts = request.num_experts
    if x.size == 0:
        return jnp.zeros_like(x)
    tiling = tiling_for(request.num_tokens * request.top_k, num_experts, request.platform)
    x, gate_up_proj, down_proj, gate_up_bias, down_bias, topk_weights, topk_ids = equally_varying(
        x, request.gate_up_proj, request.down_proj, request.gate_up_bias, request.down_bias, request.topk_weights, request.topk_ids
    )
    assignment = Assignment.of(topk_ids, request.expert_offset, num_experts)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = jnp.where(assignment.is_local(num_experts), topk_weights.astype(wide), 0)
    rows = gather_rows(x, assignment)
    if request.apply_router_weight_on_input:
        rows = (rows * weights.reshape(-1)[assignment.pair][:, None]).astype(x.dtype)
        weights = jnp.ones_like(weights)
    _, projections, width, hidden = gate_up_proj.shape
    stacked = gate_up_proj.reshape(num_experts, projections * width, hidden)
    stacked_bias = None if gate_up_bias is None else gate_up_bias.reshape(num_experts, projections * width)
    projected = multiply_groups(tiling, x.dtype, rows, stacked, stacked_bias, assignment.groups)
    activated = request.activation(*jnp.split(projected, projections, axis=1))
    results = multiply_groups(tiling, x.dtype, activated, down_proj, down_bias, assignment.groups)
    return combine_rows(results, weights, assignment).astype(x.dtype)
