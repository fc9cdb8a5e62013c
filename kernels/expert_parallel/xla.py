"""The expert-parallel MoE block from XLA collectives: every rank gathers all tokens, and results are summed and scattered.

Moves more than the rows that experts need, and overlaps nothing by itself; runs everywhere, with any dtype and any size, and its
gradient is also that of the kernel.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..activations import Activation
from ..fused_moe.api import fused_moe
from ..fused_moe.expert_block import ExpertMatrices
from ..selection import Formulation
from .request import Axis, Request

NAME = "xla"


def unsupported(request: Request) -> str | None:
    """Nothing is."""
    return None


def formulation(request: Request) -> Formulation:
    """Gather, `fused_moe`, reduce and scatter."""
    return Formulation(
        "all tokens gathered by every rank, fused_moe of its experts, sum scattered", "there is one only"
    )


def run(request: Request) -> Array:
    """Compute; differentiable in everything floating."""
    return run_with(request, None)


def run_with(request: Request, implementation: str | None) -> Array:
    """Compute with a named implementation of `fused_moe`."""
    block = request.block
    return gathered_moe(
        block.x,
        block.topk_weights,
        block.topk_ids,
        ExpertMatrices(block.gate_up_proj, block.down_proj, block.gate_up_bias, block.down_bias),
        axis=request.axis,
        layer=block.layer,
        activation=block.activation,
        apply_router_weight_on_input=block.apply_router_weight_on_input,
        recompute_activation=block.recompute_activation,
        implementation=implementation,
    )


def gathered_moe(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    weights: ExpertMatrices,
    *,
    axis: Axis,
    layer: int | Int[Array, ""] | None,
    activation: Activation,
    apply_router_weight_on_input: bool,
    recompute_activation: bool,
    implementation: str | None,
) -> Float[Array, "T H"]:
    """`fused_moe` of this rank's experts on all ranks' tokens, summed over ranks; their matrices are those of `layer` in a stack.

    What a rank contributes to a token is rounded to the dtype of x; the sum is taken in float32 and rounded again.
    """

    def gathered(array: Array) -> Array:
        return jax.lax.all_gather(array, axis, tiled=True)

    partial = fused_moe(
        gathered(x),
        gathered(topk_weights),
        gathered(topk_ids),
        weights.gate_up_proj,
        weights.down_proj,
        gate_up_bias=weights.gate_up_bias,
        down_bias=weights.down_bias,
        activation=activation,
        layer=layer,
        expert_offset=jax.lax.axis_index(axis) * weights.down_proj.shape[-3],
        apply_router_weight_on_input=apply_router_weight_on_input,
        recompute_activation=recompute_activation,
        expected_rows=topk_ids.size,  # of all ranks' choices as many as one rank has tokens' for
        implementation=implementation,
    )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.psum_scatter(partial.astype(wide), axis, tiled=True).astype(x.dtype)
