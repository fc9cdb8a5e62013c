"""The public expert-parallel MoE block: contract, and choice of an implementation."""

import dataclasses

import jax
from jax import Array
from jaxtyping import Float, Int

from ..activations import Activation
from ..fused_moe.inference import run_for_inference
from ..fused_moe.request import Request as BlockRequest
from ..selection import Choice, Implementation, choose
from . import pallas_tpu, reference, xla
from .request import Axis, Request

IMPLEMENTATIONS: tuple[Implementation[Request], ...] = (pallas_tpu, xla, reference)
"""Every implementation, the preferred ones first."""


def expert_parallel_moe(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    gate_up_proj: Float[Array, "E P I H"] | Float[Array, "L E P I H"],
    down_proj: Float[Array, "E H I"] | Float[Array, "L E H I"],
    *,
    axis: Axis,
    gate_up_bias: Float[Array, "E P I"] | None = None,
    down_bias: Float[Array, "E H"] | None = None,
    activation: str | Activation = "silu",
    layer: int | Int[Array, ""] | None = None,
    apply_router_weight_on_input: bool = False,
    recompute_activation: bool = False,
    collective_id: int = 0,
    implementation: str | None = None,
) -> Float[Array, "T H"]:
    """`fused_moe` of experts that are split over the ranks of a mesh axis, as are tokens; for use inside `jax.shard_map`.

    Rank r holds T tokens of its own and the weights of the E experts with the ids `[r * E, (r + 1) * E)`. Each rank gets for its
    tokens what `fused_moe` would give with the weights of all experts. Ids outside `[0, ranks * E)`, -1 among them, contribute
    nothing. No row is dropped, however tokens are routed.

    "pallas_tpu" sends each row to the chip that owns its expert, and results back, by remote DMA inside the kernel, while other
    rows are being multiplied. It needs `check_vma=False` in `jax.shard_map`. Its buffers have the size of the worst case, all
    ranks' tokens on one rank: `explain_expert_parallel_moe` says how many bytes that is; fewer tokens per call need less.

    Differentiable in everything floating; the gradient of any implementation gathers all ranks' tokens on each rank.

    Args:
        x: this rank's tokens, floating; as many on every rank.
        topk_weights: router weights, floating (used in float32).
        topk_ids: integer, of all ranks' experts.
        gate_up_proj: (out, in) matrices of this rank's experts, as `fused_moe` takes them.
        down_proj: (out, in) matrices of this rank's experts.
        axis: name of the mesh axis, or names of several that count as one.
        gate_up_bias: added before the activation.
        down_bias: added before the router weight is applied.
        activation: a name, or an `Activation` with its parameters.
        layer: which of L layers these experts belong to, if both projections are those of stacked layers; see `fused_moe`.
        apply_router_weight_on_input: multiply the expert's input instead of its output by the router weight (Llama 4).
        recompute_activation: keep less during the gradient.
        collective_id: of the kernel's barrier between ranks. Calls may share it; another kernel with a barrier may not, if some
            rank may run it while others run this.
        implementation: "pallas_tpu", "xla" or "reference"; None chooses by device and shape, see `explain_expert_parallel_moe`.

    Raises:
        ValueError: shapes that do not fit, an unknown activation or implementation.
        TypeError: dtypes other than those above, a layer that is not one integer.
        NotImplementedError: an implementation asked for by name cannot compute these arguments.
    """
    block = BlockRequest.of(
        x,
        topk_weights,
        topk_ids,
        gate_up_proj,
        down_proj,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        layer=layer,
        apply_router_weight_on_input=apply_router_weight_on_input,
        recompute_activation=recompute_activation,
    )
    request = Request(block.equally_varying(), axis, jax.lax.axis_size(axis), collective_id)
    chosen, _ = choose("expert_parallel_moe", IMPLEMENTATIONS, request, implementation)
    if layer is None:
        return chosen.run(request)
    return run_for_inference(lambda block: chosen.run(dataclasses.replace(request, block=block)), request.block)


def explain_expert_parallel_moe(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    gate_up_proj: Float[Array, "E P I H"] | Float[Array, "L E P I H"],
    down_proj: Float[Array, "E H I"] | Float[Array, "L E H I"],
    *,
    num_ranks: int,
    axis: Axis = "expert",
    gate_up_bias: Float[Array, "E P I"] | None = None,
    down_bias: Float[Array, "E H"] | None = None,
    activation: str | Activation = "silu",
    layer: int | Int[Array, ""] | None = None,
    apply_router_weight_on_input: bool = False,
    recompute_activation: bool = False,
    collective_id: int = 0,
    implementation: str | None = None,
) -> Choice:
    """What `expert_parallel_moe` would run on `num_ranks` ranks for these arguments of one of them, and why.

    Works outside `jax.shard_map`, and with `jax.ShapeDtypeStruct`s. Names tiles and the bytes of the kernel's buffers. Raises
    what `expert_parallel_moe` raises.
    """
    block = BlockRequest.of(
        x,
        topk_weights,
        topk_ids,
        gate_up_proj,
        down_proj,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        layer=layer,
        apply_router_weight_on_input=apply_router_weight_on_input,
        recompute_activation=recompute_activation,
    )
    request = Request(block, axis, num_ranks, collective_id)
    return choose("expert_parallel_moe", IMPLEMENTATIONS, request, implementation)[1]
