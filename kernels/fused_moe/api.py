"""The public fused MoE block: contract, and choice of an implementation."""

from jax import Array
from jaxtyping import Float, Int

from ..activations import Activation
from ..selection import Choice, Implementation, choose
from . import pallas_gpu, pallas_tpu, reference, xla
from .inference import run_for_inference
from .request import Request

IMPLEMENTATIONS: tuple[Implementation[Request], ...] = (pallas_gpu, pallas_tpu, xla, reference)
"""Every implementation, the preferred ones first."""
IMPLEMENTATION_NAMES = tuple(implementation.NAME for implementation in IMPLEMENTATIONS)
"""What `fused_moe` takes as `implementation`, besides None."""


def fused_moe(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    gate_up_proj: Float[Array, "E P I H"] | Float[Array, "L E P I H"],
    down_proj: Float[Array, "E H I"] | Float[Array, "L E H I"],
    *,
    gate_up_bias: Float[Array, "E P I"] | None = None,
    down_bias: Float[Array, "E H"] | None = None,
    activation: str | Activation = "silu",
    expert_offset: int | Int[Array, ""] = 0,
    layer: int | Int[Array, ""] | None = None,
    apply_router_weight_on_input: bool = False,
    recompute_activation: bool = False,
    expected_rows: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T H"]:
    """The experts of an MoE block: for each token, the weighted sum of its chosen experts' outputs.

    y[t] = sum over k of topk_weights[t, k] * (down_proj[e] @ act(gate_up_proj[e] @ x[t] + gate_up_bias[e]) + down_bias[e])
    with e = topk_ids[t, k] - expert_offset. Matmuls accumulate in float32 and the sum over k is taken in float32, in the
    order of k, or round by round where rows come in rounds (see `rounds.py`). What is stored in between has the dtype of x, as
    upstream's has, biases and router weights having been applied before. The activation's input is stored for a gradient, and on
    the way from one matmul of XLA to the next with many rows of bfloat16 and no bias; elsewhere it stays float32. (XLA stores
    results of bfloat16, which float32 does not exceed, before they are weighted.)

    Ids outside `[expert_offset, expert_offset + E)`, -1 among them, contribute nothing: neither their weight nor (if a token
    has no other) the token's row is looked at, so both may be NaN. Devices that hold different experts can therefore pass
    the same ids, and their results add up to the whole.

    Differentiable in everything floating. No result depends on the order in which a device happens to sum.

    Args:
        x: tokens, floating.
        topk_weights: router weights, floating (used in float32).
        topk_ids: integer; the same expert may be named twice.
        gate_up_proj: (out, in) matrices of the dtype of x, or float32: they are then rounded to the dtype of x, and their
            gradient is float32, never rounded. P = 2 (0 = gate, 1 = up) for a gated activation, otherwise P = 1.
        down_proj: (out, in) matrices, as `gate_up_proj`.
        gate_up_bias: added before the activation.
        down_bias: added before the router weight is applied.
        activation: a name, or an `Activation` with its parameters.
        expert_offset: id of the first expert whose weights are given.
        layer: which layer's matrices to use, if both projections are those of L layers, stacked along a leading axis. (Biases,
            which are small, are the layer's own.) Inside a scan over layers this saves what indexing before the call costs: a
            copy of the layer's matrices, on accelerators and on CPUs. With a gradient they are indexed all the same. An array
            outside [0, L) counts as the nearest layer; an int is refused.
        apply_router_weight_on_input: multiply the expert's input instead of its output by the router weight (Llama 4).
        recompute_activation: keep less for the gradient, and compute what enters the activation again (half a forward pass).
        expected_rows: about how many of the T * K choices name one of these experts, if not all of them do: where a device has
            the experts of one rank of R, T * K / R. Kernels, formulations and tile sizes are chosen for so many, and memory is
            bounded by it where that saves much (see `rounds.py`); the result is right for any number. None: all of them do.
        implementation: "pallas_gpu", "pallas_tpu", "xla" or "reference"; None chooses by device and shape, see `explain_fused_moe`.

    Raises:
        ValueError: shapes that do not fit, an unknown activation or implementation.
        TypeError: dtypes other than those above, an offset or layer that is not one integer.
        NotImplementedError: an implementation asked for by name cannot compute these arguments.

    Source: spec 10.2; vLLM `fused_moe/fused_moe.py` (`fused_experts_impl`).
    """
    request = Request.of(
        x,
        topk_weights,
        topk_ids,
        gate_up_proj,
        down_proj,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        expert_offset=expert_offset,
        layer=layer,
        apply_router_weight_on_input=apply_router_weight_on_input,
        recompute_activation=recompute_activation,
        expected_rows=expected_rows,
    )
    chosen, _ = choose("fused_moe", IMPLEMENTATIONS, request, implementation)
    request = request.equally_varying()
    return chosen.run(request) if layer is None else run_for_inference(chosen.run, request)


def explain_fused_moe(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    gate_up_proj: Float[Array, "E P I H"] | Float[Array, "L E P I H"],
    down_proj: Float[Array, "E H I"] | Float[Array, "L E H I"],
    *,
    gate_up_bias: Float[Array, "E P I"] | None = None,
    down_bias: Float[Array, "E H"] | None = None,
    activation: str | Activation = "silu",
    expert_offset: int | Int[Array, ""] = 0,
    layer: int | Int[Array, ""] | None = None,
    apply_router_weight_on_input: bool = False,
    recompute_activation: bool = False,
    expected_rows: int | None = None,
    implementation: str | None = None,
) -> Choice:
    """What `fused_moe` would run for these arguments (arrays or `jax.ShapeDtypeStruct`s), and why.

    Names the implementation, its formulation with block sizes, and each rejected implementation with its reason. Raises
    what `fused_moe` raises.
    """
    request = Request.of(
        x,
        topk_weights,
        topk_ids,
        gate_up_proj,
        down_proj,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        expert_offset=expert_offset,
        layer=layer,
        apply_router_weight_on_input=apply_router_weight_on_input,
        recompute_activation=recompute_activation,
        expected_rows=expected_rows,
    )
    return choose("fused_moe", IMPLEMENTATIONS, request, implementation)[1]
