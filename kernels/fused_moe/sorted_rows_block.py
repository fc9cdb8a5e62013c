"""The fused MoE block from kernels on sorted rows, with its gradient: the same on GPUs and TPUs but for the kernels.

Rows are gathered, sorted by expert, into a layout in which each expert's rows begin where the kernels can address them. One
kernel multiplies them by gate and up and applies the activation, one multiplies by down and applies the router's weight, and
each token's results are summed in the order of its choices. With few rows per expert, kernels may stream weights instead; see
`choice.py` beside the kernels.

The gradient recomputes the gathered rows. What enters the activation is kept for it, or computed again if asked for.
"""

import functools
from types import ModuleType
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..activations import Activation
from ..device import GpuDevice, TpuDevice
from ..groups import Groups
from ..selection import Formulation
from .assignment import MOST_COMPARISONS, Assignment, inverse_of, names
from .expert_block import ExpertMatrices
from .request import Request


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


class AlignedRows(NamedTuple):
    """Where the pairs of tokens and experts lie in the aligned layout of M rows."""

    pair: Int[Array, "M"]
    """Pair (token * K + choice) of each row; -1 for padding and for rows of no expert."""
    position: Int[Array, "T K"]
    """Row of each pair; 0 for pairs without a local expert."""
    is_local: Bool[Array, "T K"]
    """Whether a pair's expert is here."""
    groups: Groups
    """Rows of each local expert."""

    @classmethod
    def of(cls, assignment: Assignment, num_experts: int, schedule: ModuleType, most_comparisons: int) -> Self:
        """Move the sorted rows so that each expert's begin where `schedule`, that of the kernels, wants them.

        Rows find their pairs by comparing all with all, if that takes no more than `most_comparisons`.
        """
        groups = schedule.aligned_groups(assignment.groups.sizes)
        is_local = assignment.is_local(num_experts)
        expert = jnp.minimum(assignment.expert, num_experts - 1)
        shift = (groups.starts - assignment.groups.starts)[expert]
        position = jnp.where(is_local, assignment.position + shift, 0)
        num_rows = schedule.aligned_num_rows(position.size, num_experts)
        pair = inverse_of(_target(position, is_local, num_rows), num_rows, most_comparisons)
        return cls(pair, position, is_local, groups)

    @property
    def token(self) -> Int[Array, "M"]:
        """Token of each row; 0 for rows that are no pair's."""
        return jnp.maximum(self.pair, 0) // self.position.shape[1]

    def spread(self, values: Float[Array, "T K"], most_comparisons: int) -> Float[Array, "M"]:
        """Each row's value; zero for rows that are no pair's. Found in the same way as `pair`, and in the same kernel."""
        num_rows = self.pair.shape[0]
        if num_rows * values.size <= most_comparisons:
            named = names(_target(self.position, self.is_local, num_rows), num_rows)
            return jnp.sum(jnp.where(named, values.reshape(-1), 0), axis=1)
        return jnp.where(self.pair >= 0, values.reshape(-1)[jnp.maximum(self.pair, 0)], 0)

    def collect(self, values: Float[Array, "M"]) -> Float[Array, "T K"]:
        """Each pair's value; zero for pairs without a local expert."""
        return jnp.where(self.is_local, values[self.position], 0)

    def combine(self, rows: Float[Array, "M H"]) -> Float[Array, "T H"]:
        """Sum of each token's rows in float32, in the order of its choices."""
        total = jnp.zeros((), jnp.float32)
        for choice in range(self.position.shape[1]):
            row = rows[self.position[:, choice]].astype(jnp.float32)
            total = total + jnp.where(self.is_local[:, choice, None], row, 0)
        return total


def _target(position: Int[Array, "T K"], is_local: Bool[Array, "T K"], num_rows: int) -> Int[Array, "T*K"]:
    """Row of each pair; `num_rows` for pairs without a local expert."""
    return jnp.where(is_local, position, num_rows).reshape(-1)


def formulation(request: Request, matmuls: ModuleType, device: GpuDevice | TpuDevice) -> Formulation:
    """Kernels and tiles of the forward pass."""
    expected_rows, dtype = request.expected_rows, request.x.dtype
    gate_up_shape = (request.num_experts, request.projections, request.intermediate_size, request.hidden_size)
    down_shape = (request.num_experts, 1, request.hidden_size, request.intermediate_size)
    kernel, gate_up = matmuls.chosen_for_forward(expected_rows, gate_up_shape, dtype, dtype, device)
    _, down = matmuls.chosen_for_forward(expected_rows, down_shape, dtype, dtype, device)
    return Formulation(
        f"{kernel} kernel, gate/up {gate_up.tiles}, down {down.tiles}",
        f"gate/up: {gate_up.reason}; down: {down.reason}",
    )


def run(request: Request, matmuls: ModuleType, device: GpuDevice | TpuDevice) -> Array:
    """Compute a request with these kernels; differentiable in everything floating."""
    if request.x.size == 0:
        return jnp.zeros_like(request.x)
    computation = Computation(
        matmuls,
        device,
        request.activation,
        request.apply_router_weight_on_input,
        request.recompute_activation,
        request.expected_rows,
    )
    num_experts, most_comparisons = request.num_experts, computation.most_comparisons
    assignment = Assignment.of(request.topk_ids, request.expert_offset, num_experts, most_comparisons=most_comparisons)
    aligned = AlignedRows.of(assignment, num_experts, matmuls.schedule, most_comparisons)
    topk_weights = jnp.where(aligned.is_local, request.topk_weights.astype(jnp.float32), 0)
    weights = request.expert_weights()
    return compute(computation, request.x, topk_weights, weights, aligned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def compute(
    computation: Computation,
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    weights: ExpertMatrices,
    aligned: AlignedRows,
) -> Float[Array, "T H"]:
    """`topk_weights` are zero for pairs without a local expert."""
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
    rows = x[aligned.token]
    router_weight = aligned.spread(topk_weights, computation.most_comparisons)
    if not computation.apply_router_weight_on_input:
        return rows, router_weight
    return (rows.astype(jnp.float32) * router_weight[:, None]).astype(x.dtype), None


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
    return aligned.combine(results)[:, :hidden].astype(activated.dtype)  # kernels may pad columns


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
    result_gradient = cotangent.astype(x.dtype)[aligned.token]
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
        per_row = jnp.sum(rows_gradient.astype(jnp.float32) * x[aligned.token].astype(jnp.float32), axis=1)
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
