"""The expert-parallel MoE block around the kernel, with its gradient.

Ranks tell each other how many rows they have for each expert (an all-gather of a few kilobytes), lay out their rows accordingly,
and run the kernel, which sends them; each token's results are summed in the order of its choices.

The gradient is that of the XLA formulation (`xla.py`): it gathers all ranks' tokens and cotangents, computes with the gradients
of `fused_moe`, and scatters sums. Nothing but the arguments is kept for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..activations import Activation
from ..device import TpuDevice
from ..fused_moe.expert_block import ExpertMatrices
from . import xla
from .exchange import Exchange, SentBlocks, most_rows_received
from .kernel import exchange_and_compute
from .request import Axis, Request
from .tiles import ExpertParallelTiles


class Computation(NamedTuple):
    """What to compute, without the arrays."""

    device: TpuDevice
    axis: Axis
    num_ranks: int
    num_local_experts: int
    activation: Activation
    apply_router_weight_on_input: bool
    recompute_activation: bool
    tiles: ExpertParallelTiles
    collective_id: int


def compute(request: Request, tiles: ExpertParallelTiles) -> Float[Array, "T H"]:
    """The result for this rank's tokens."""
    block = request.block
    computation = Computation(
        block.tpu,
        request.axis,
        request.num_ranks,
        block.num_experts,
        block.activation,
        block.apply_router_weight_on_input,
        block.recompute_activation,
        tiles,
        request.collective_id,
    )
    return _compute(computation, block.x, block.topk_weights, block.expert_weights(), block.topk_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute(
    computation: Computation,
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    weights: ExpertMatrices,
    topk_ids: Int[Array, "T K"],
) -> Float[Array, "T H"]:
    num_ranks, axis, num_local = computation.num_ranks, computation.axis, computation.num_local_experts
    sent = SentBlocks.of(topk_ids, num_ranks * num_local)
    block_rows = jax.lax.all_gather(sent.block_rows, axis)
    exchange = Exchange.of(block_rows, jax.lax.axis_index(axis))
    topk_weights = topk_weights.astype(jnp.float32)
    rows = x[sent.token]
    if computation.apply_router_weight_on_input:
        rows = (rows * topk_weights.reshape(-1)[sent.pair][:, None]).astype(x.dtype)
        topk_weights = jnp.ones_like(topk_weights)
    results = exchange_and_compute(
        rows,
        weights.matrices_as(x.dtype),
        exchange,
        num_received=most_rows_received(topk_ids.size, num_local, num_ranks),
        axis=axis,
        activation=computation.activation,
        tiles=computation.tiles,
        vmem_limit_bytes=computation.device.vmem_bytes,
        collective_id=computation.collective_id,
    )
    return sent.combine(results, topk_weights).astype(x.dtype)


def _forward(computation, x, topk_weights, weights, topk_ids):
    return _compute(computation, x, topk_weights, weights, topk_ids), (x, topk_weights, weights, topk_ids)


def _backward(computation, saved, cotangent):
    x, topk_weights, weights, topk_ids = saved

    def by_collectives(x, topk_weights, weights):
        return xla.gathered_moe(
            x,
            topk_weights,
            topk_ids,
            weights,
            axis=computation.axis,
            layer=None,
            activation=computation.activation,
            apply_router_weight_on_input=computation.apply_router_weight_on_input,
            recompute_activation=computation.recompute_activation,
            implementation=None,
        )

    _, pullback = jax.vjp(by_collectives, x, topk_weights, weights)
    return *pullback(cotangent), None


_compute.defvjp(_forward, _backward)
