"""The fused MoE block from kernels on sorted rows, with its gradient: the same on GPUs and TPUs but for the kernels.

Rows are gathered, sorted by expert, into a layout in which each expert's rows begin where the kernels can address them. One
kernel multiplies them by gate and up and applies the activation, one multiplies by down and applies the router's weight, and
each token's results are summed in the order of its choices. With few rows per expert, kernels may stream weights instead; see
`choice.py` beside the kernels. Where most choices are other ranks', rows come in rounds; see `rounds.py`.

The gradient recomputes the gathered rows. What enters the activation is kept for it, or computed again if asked for.
"""

import dataclasses
import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..activations import Activation
from ..assignment import MOST_COMPARISONS, Assignment
from ..device import GpuDevice, TpuDevice
from ..groups import Groups
from ..selection import Formulation
from ..sum_of_rounds import sum_of_rounds
from .aligned_rows import AlignedRows
from .expert_block import ExpertMatrices
from .inference import run_for_inference
from .request import Request
from .rounds import RowsPerRound


class Computation(NamedTuple):
    """What to compute, without the arrays."""

    matmuls: ModuleType
    """The kernels: `mosaic_gpu.matmuls` or `mosaic_tpu.matmuls`, which have the same functions."""
    device: GpuDevice | TpuDevice
    activation: Activation
    apply_router_weight_on_input: bool
    recompute_activation: bool
    expected_rows: int
    """What kernels and tiles are chosen for."""

    @property
    def most_comparisons(self) -> int:
        """Up to which all are compared with all."""
        return MOST_COMPARISONS[self.device.platform]


def formulation(request: Request, matmuls: ModuleType, device: GpuDevice | TpuDevice) -> Formulation:
    """Kernels and tiles of the forward pass."""
    expected_rows, dtype = request.expected_rows, request.x.dtype
    gate_up_shape = (request.num_experts, request.projections, request.intermediate_size, request.hidden_size)
    down_shape = (request.num_experts, 1, request.hidden_size, request.intermediate_size)
    kernel, gate_up = matmuls.chosen_for_forward(expected_rows, gate_up_shape, dtype, dtype, device)
    _, down = matmuls.chosen_for_forward(expected_rows, down_shape, dtype, dtype, device)
    rounds = str(RowsPerRound.of(request, device.platform))
    parts = [f"{kernel} kernel", f"gate/up {gate_up.tiles}", f"down {down.tiles}", *([rounds] if rounds else [])]
    return Formulation(
        ", ".join(parts),
        f"gate/up: {gate_up.reason}; down: {down.reason}",
    )


def run(request: Request, matmuls: ModuleType, device: GpuDevice | TpuDevice) -> Array:
    """Compute a request with these kernels; differentiable in everything floating."""
    if request.x.size == 0:
        return jnp.zeros_like(request.x)
    without_gradient, with_gradient = RowsPerRound.of(request, device.platform)
    if without_gradient == with_gradient:
        return _run(request, matmuls, device)
    return run_for_inference(functools.partial(_run, matmuls=matmuls, device=device), request)


def _run(request: Request, matmuls: ModuleType, device: GpuDevice | TpuDevice) -> Array:
    computation = Computation(
        matmuls,
        device,
        request.activation,
        request.apply_router_weight_on_input,
        request.recompute_activation,
        request.expected_rows,
    )
    num_experts = request.num_experts
    assignment = Assignment.of(
        request.topk_ids, request.expert_offset, num_experts, most_comparisons=computation.most_comparisons
    )
    is_local = assignment.is_local(num_experts)
    topk_weights = jnp.where(is_local, request.topk_weights.astype(jnp.float32), 0)
    weights = request.expert_weights()
    rows_per_round = RowsPerRound.of(request, device.platform)
    num_rows = rows_per_round.with_gradient if request.takes_gradient else rows_per_round.without_gradient
    if num_rows is None:
        aligned = AlignedRows.of(assignment, num_experts, matmuls.schedule, computation.most_comparisons)
        return compute(computation, request.x, topk_weights, weights, aligned).astype(request.x.dtype)
    one_round = Round(computation, num_rows)
    constants = assignment, weights.first_matrix
    variables = request.x, topk_weights, weights._replace(first_matrix=None)
    num_rounds = -(-jnp.sum(assignment.groups.sizes, dtype=jnp.int32) // num_rows)
    first = one_round(jnp.int32(0), constants, variables)
    return sum_of_rounds(one_round, num_rounds, constants, variables, first).astype(request.x.dtype)


@dataclasses.dataclass(frozen=True)
class Round:
    """A term of `sum_of_rounds`: the results of so many of the sorted rows."""

    computation: Computation
    num_rows: int

    def __call__(
        self,
        number: Int[Array, ""],
        constants: tuple[Assignment, Int[Array, ""] | None],
        variables: tuple[Float[Array, "T H"], Float[Array, "T K"], ExpertMatrices],
    ) -> Float[Array, "T H"]:
        """Compute the rows of this round: those from `number * num_rows` on."""
        assignment, first_matrix = constants
        x, topk_weights, weights = variables
        computation = self.computation
        aligned = AlignedRows.of(
            assignment,
            assignment.groups.sizes.shape[0],
            computation.matmuls.schedule,
            computation.most_comparisons,
            window=(number.astype(jnp.int32) * self.num_rows, self.num_rows),
        )
        return compute(computation, x, topk_weights, weights._replace(first_matrix=first_matrix), aligned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def compute(
    computation: Computation,
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    weights: ExpertMatrices,
    aligned: AlignedRows,
) -> Float[Array, "T H"]:
    """The results of these rows, in float32. `topk_weights` are zero for pairs without a local expert."""
    rows, router_weight = _rows_of(computation, x, topk_weights, aligned)
    matrices = weights.matrices_as(x.dtype)
    activated = computation.matmuls.multiply(
        rows,
        matrices.gate_up_proj,
        aligned.groups,
        first_matrix=matrices.start,
        bias=weights.gate_up_bias,
        activation=computation.activation,
        expected_rows=computation.expected_rows,
        output_dtype=x.dtype,
        device=computation.device,
    )
    return _down(computation, activated, router_weight, matrices, aligned)


def _rows_of(computation, x, topk_weights, aligned) -> tuple[Float[Array, "M H"], Float[Array, "M"] | None]:
    """The rows that enter the experts, and the router weights that are still to be applied to their results."""
    rows = _tokens_of(computation, x, aligned)
    router_weight = aligned.spread(topk_weights, computation.most_comparisons)
    if not computation.apply_router_weight_on_input:
        return rows, router_weight
    return (rows.astype(jnp.float32) * router_weight[:, None]).astype(x.dtype), None


def _tokens_of(computation, x, aligned) -> Float[Array, "M H"]:
    """Each row's token; anything for padding.

    On a GPU, where most choices are other ranks', rows are scattered: it leaves out the others, which a gather would write too.
    """
    most_are_elsewhere = 2 * computation.expected_rows <= aligned.position.size
    return aligned.scatter(x) if most_are_elsewhere and computation.device.platform == "gpu" else aligned.gather(x)


def _down(computation, activated, router_weight, matrices, aligned) -> Float[Array, "T H"]:
    results = computation.matmuls.multiply(
        activated,
        matrices.down_proj[:, None],
        aligned.groups,
        first_matrix=matrices.start,
        bias=None if matrices.down_bias is None else matrices.down_bias[:, None],
        row_scale=router_weight,
        expected_rows=computation.expected_rows,
        output_dtype=activated.dtype,
        device=computation.device,
    )
    hidden = matrices.down_proj.shape[1]
    return aligned.combine(results)[:, :hidden]  # kernels may pad columns


def _project(computation, rows, matrices, aligned) -> tuple[Float[Array, "M I"], Float[Array, "M P I"]]:
    """The activated rows, and what entered the activation."""
    return computation.matmuls.multiply_and_keep(
        rows,
        matrices.gate_up_proj,
        aligned.groups,
        bias=matrices.gate_up_bias,
        activation=computation.activation,
        keep_projected=True,
        expected_rows=computation.expected_rows,
        output_dtype=rows.dtype,
        device=computation.device,
    )


def _forward(computation, x, topk_weights, weights, aligned):
    if computation.recompute_activation:
        return compute(computation, x, topk_weights, weights, aligned), (x, topk_weights, weights, aligned, None)
    rows, router_weight = _rows_of(computation, x, topk_weights, aligned)
    matrices = weights.matrices_as(x.dtype)
    activated, projected = _project(computation, rows, matrices, aligned)
    result = _down(computation, activated, router_weight, matrices, aligned)
    return result, (x, topk_weights, weights, aligned, projected)


def _backward(computation, saved, cotangent):
    x, topk_weights, weights, aligned, projected = saved
    matmuls, device = computation.matmuls, computation.device
    groups, expected_rows = aligned.groups, computation.expected_rows
    matrices = weights.matrices_as(x.dtype)
    rows, router_weight = _rows_of(computation, x, topk_weights, aligned)
    if projected is None:
        _, projected = _project(computation, rows, matrices, aligned)

    # Without router weights: the gradient with respect to a router weight is the product of both sides of the down projection.
    result_gradient = _tokens_of(computation, cotangent.astype(x.dtype), aligned)
    activated_gradient = matmuls.rows_gradient(
        result_gradient, matrices.down_proj, groups, expected_rows=expected_rows, output_dtype=x.dtype, device=device
    ).astype(jnp.float32)
    activated, activation_pullback = jax.vjp(
        lambda projected: computation.activation(*jnp.unstack(projected, axis=1)), projected.astype(jnp.float32)
    )
    scale = 1.0 if router_weight is None else router_weight[:, None]
    (projected_gradient,) = activation_pullback(activated_gradient * scale)
    projected_gradient = projected_gradient.astype(x.dtype)
    scaled = (activated * scale).astype(x.dtype)
    down_gradient = matmuls.weights_gradient(
        result_gradient,
        scaled,
        groups,
        expected_rows=expected_rows,
        output_dtype=weights.down_proj.dtype,
        device=device,
    )

    num_experts, projections, intermediate, hidden = matrices.gate_up_proj.shape
    flat_gradient = projected_gradient.reshape(-1, projections * intermediate)
    rows_gradient = matmuls.rows_gradient(
        flat_gradient,
        matrices.gate_up_proj.reshape(num_experts, projections * intermediate, hidden),
        groups,
        expected_rows=expected_rows,
        output_dtype=x.dtype,
        device=device,
    )
    gate_up_gradient = matmuls.weights_gradient(
        flat_gradient, rows, groups, expected_rows=expected_rows, output_dtype=weights.gate_up_proj.dtype, device=device
    ).reshape(weights.gate_up_proj.shape)

    gate_up_bias_gradient = down_bias_gradient = None
    if weights.gate_up_bias is not None:
        gate_up_bias_gradient = matmuls.bias_gradient(flat_gradient, groups).reshape(weights.gate_up_bias.shape)
        gate_up_bias_gradient = gate_up_bias_gradient.astype(weights.gate_up_bias.dtype)
    if weights.down_bias is not None:
        down_bias_gradient = matmuls.bias_gradient(result_gradient, groups, router_weight)
        down_bias_gradient = down_bias_gradient.astype(weights.down_bias.dtype)

    if router_weight is None:
        scale = aligned.spread(topk_weights, computation.most_comparisons)[:, None]
        per_row = jnp.sum(
            rows_gradient.astype(jnp.float32) * _tokens_of(computation, x, aligned).astype(jnp.float32), axis=1
        )
        rows_gradient = rows_gradient.astype(jnp.float32) * scale
    else:
        per_row = jnp.sum(activated_gradient * activated, axis=1)
        if weights.down_bias is not None:
            per_row += _dot_with_bias(result_gradient, weights.down_bias, groups)
    x_gradient = aligned.combine(rows_gradient).astype(x.dtype)
    weights_gradient = ExpertMatrices(gate_up_gradient, down_gradient, gate_up_bias_gradient, down_bias_gradient)
    return x_gradient, aligned.collect(per_row), weights_gradient, None


compute.defvjp(_forward, _backward)


def _dot_with_bias(rows: Float[Array, "M H"], bias: Float[Array, "E H"], groups: Groups) -> Float[Array, "M"]:
    """Each row's scalar product with the bias of its expert; any value for rows of no expert."""
    row = jnp.arange(rows.shape[0])
    expert = jnp.sum(row[:, None] >= (groups.starts + groups.sizes)[None, :], axis=1)
    bias_of_row = bias.astype(jnp.float32)[jnp.minimum(expert, bias.shape[0] - 1)]
    return jnp.sum(rows.astype(jnp.float32) * bias_of_row, axis=1)
