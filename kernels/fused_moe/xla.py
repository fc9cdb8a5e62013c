"""The fused MoE block from ordinary XLA operations. For CPUs, and any accelerator without a kernel.

Three formulations, chosen from static shapes by `plan`:

- *streamed*, on CPUs: every pair of a token and an expert by itself, reading the expert's weights in place (`streamed.py`).
- *batched*: every expert gets `capacity` slots, and one batched matmul reads the weights in place, without a copy. Rows that
  find no slot, which is rare unless routing is skewed, are computed block by block afterwards and added.
- *loop*, elsewhere with few rows: over blocks of sorted rows of one expert each. Reads only the experts that are used.

Gradients are those of a fourth one, which keeps what they need: gather, grouped matmul, activation, grouped matmul, combine.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..activations import Activation
from ..grouped_matmul.blocks import Schedule
from ..grouped_matmul.xla import multiply_groups, tiling_for
from ..groups import Groups
from ..selection import Formulation
from ..varying import varying_like
from .assignment import Assignment, combine_rows, gather_rows
from .expert_block import ExpertWeights, apply_expert, kept_apart
from .request import Request
from .streamed import apply_expert_to_row

NAME = "xla"


class Plan(NamedTuple):
    """How to compute, from static shapes: hashable, so that it can be a static argument."""

    formulation: Literal["streamed", "batched", "loop"]
    """See the module's description."""
    capacity: int
    """Slots per expert of the batched formulation."""
    block_rows: int
    """Rows per block of the loop, and of the rows that find no slot."""
    slice_bytes: int
    """Largest slice of a matrix that a block copies at once."""
    platform: str
    """Where it runs; decides the block sizes of the gradient."""


class Computation(NamedTuple):
    """What to compute, without the arrays."""

    plan: Plan
    activation: Activation
    apply_router_weight_on_input: bool
    recompute_activation: bool


def unsupported(request: Request) -> str | None:
    """Nothing is."""
    return None


_MOST_ROWS_PER_BLOCK = 128
"""Larger blocks compute too many rows in vain, smaller ones copy an expert's weights too often."""


def plan(request: Request) -> tuple[Plan, str]:
    """The formulation for these static shapes, and why.

    A function of the expected rows, E, H, I, the dtype and the platform alone, never of values, so that a call compiles once.
    """
    num_rows, num_experts = request.expected_rows, request.num_experts
    mean = num_rows / num_experts
    on_cpu = request.platform == "cpu"
    slice_bytes = 4 * 2**20 if on_cpu else 2**31
    spread = f"{num_rows} rows for {num_experts} experts are {mean:.3g} each on average"
    if mean < 1:
        why = f"{spread}: many experts are not used, and only those that are need be read"
        return Plan("streamed" if on_cpu else "loop", 0, 8, slice_bytes, request.platform), why
    # Two standard deviations above the mean of random routing: most experts need no more.
    usual_rows = -(-math.ceil(mean + 2 * math.sqrt(mean)) // 8) * 8
    why = f"{spread}: computing the slots that stay empty costs less than copying the weights"
    return Plan("batched", usual_rows, min(usual_rows, _MOST_ROWS_PER_BLOCK), slice_bytes, request.platform), why


def formulation(request: Request) -> Formulation:
    """What `plan` chose."""
    chosen, why = plan(request)
    if chosen.formulation == "streamed":
        return Formulation("streamed, one row of one expert at a time", why)
    blocks = f"blocks of {chosen.block_rows} rows, slices of at most {chosen.slice_bytes / 2**20:.3g} MiB of a matrix"
    if chosen.formulation == "batched":
        return Formulation(f"batched with {chosen.capacity} slots per expert, rows without a slot in {blocks}", why)
    return Formulation(f"loop over {blocks}", why)


def run(request: Request) -> Array:
    """Compute; differentiable in everything floating."""
    if request.x.size == 0 or request.intermediate_size == 0:
        return jnp.zeros_like(request.x)
    assignment = Assignment.of(request.topk_ids, request.expert_offset, request.num_experts)
    wide = jnp.promote_types(request.x.dtype, jnp.float32)
    topk_weights = jnp.where(assignment.is_local(request.num_experts), request.topk_weights.astype(wide), 0)
    weights = request.expert_weights()
    computation = Computation(
        plan(request)[0], request.activation, request.apply_router_weight_on_input, request.recompute_activation
    )
    return _compute(computation, request.x, topk_weights, weights, assignment)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute(
    computation: Computation,
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    weights: ExpertWeights,
    assignment: Assignment,
) -> Float[Array, "T H"]:
    """The block without a gradient in mind. `topk_weights` are zero for pairs without a local expert."""
    compute = {"streamed": _streamed, "batched": _batched, "loop": _loop}[computation.plan.formulation]
    return compute(computation, x, topk_weights, weights.matrices_as(x.dtype), assignment).astype(x.dtype)


def _forward(computation, x, topk_weights, weights, assignment):
    def differentiable(x, topk_weights, weights):
        return _with_gradient(computation, x, topk_weights, weights, assignment)

    if computation.recompute_activation:
        differentiable = jax.checkpoint(differentiable)
    return jax.vjp(differentiable, x, topk_weights, weights)


def _backward(computation, pullback, cotangent):
    return *pullback(cotangent), None


_compute.defvjp(_forward, _backward)


_MOST_PAIRS_UNROLLED = 16
"""XLA on CPUs runs a loop's body on one core; unrolled pairs use all of them, but each takes a while to compile."""


def _streamed(computation, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """Pair by pair."""
    num_experts = assignment.groups.sizes.shape[0]
    num_tokens, top_k = topk_weights.shape
    input_weights, output_weights = _split_weights(computation, topk_weights)

    def result_of(pair: Array | int, expert: Array) -> Float[Array, "H"]:
        row = _rows_of(x, input_weights, jnp.asarray(pair)[None], assignment)[0]
        return apply_expert_to_row(row, weights, expert, computation.activation)

    if num_tokens * top_k <= _MOST_PAIRS_UNROLLED:
        experts = jnp.minimum(assignment.expert, num_experts - 1).reshape(-1)
        results = jnp.stack([result_of(pair, experts[pair]) for pair in range(num_tokens * top_k)])
        order = jnp.arange(num_tokens * top_k).reshape(num_tokens, top_k)
        return _combine(results, output_weights, order, assignment.is_local(num_experts))

    def one_pair(index: Array, results: Array) -> Array:
        pair = assignment.pair[index]
        result = result_of(pair, assignment.expert.reshape(-1)[pair])
        return jax.lax.dynamic_update_index_in_dim(results, result, index, 0)

    nothing = varying_like(jnp.zeros((num_tokens * top_k, x.shape[1]), topk_weights.dtype), x)
    num_local = jnp.sum(assignment.groups.sizes)
    results = jax.lax.fori_loop(0, num_local, one_pair, nothing)
    return _combine(results, output_weights, assignment.position, assignment.is_local(num_experts))


def _loop(computation, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """Block by block; a block's surplus rows, which belong to the next expert, are overwritten by the blocks that follow."""
    block_rows = computation.plan.block_rows
    num_pairs = assignment.pair.shape[0]
    schedule = Schedule.of(assignment.groups, num_pairs, block_rows)
    pair = jnp.pad(assignment.pair, (0, block_rows))
    input_weights, output_weights = _split_weights(computation, topk_weights)

    def block(index: Array, results: Array) -> Array:
        first = schedule.row[index]
        pairs = jax.lax.dynamic_slice_in_dim(pair, first, block_rows)
        rows = _rows_of(x, input_weights, pairs, assignment)
        output = _apply(computation, rows, weights, schedule.group[index])
        return jax.lax.dynamic_update_slice_in_dim(results, output, first, axis=0)

    nothing = varying_like(jnp.zeros((num_pairs + block_rows, x.shape[1]), x.dtype), x)
    results = jax.lax.fori_loop(0, schedule.num_blocks, block, nothing)
    is_local = assignment.is_local(assignment.groups.sizes.shape[0])
    return _combine(results, output_weights, assignment.position, is_local)


def _batched(computation, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """All experts at once on the first `capacity` rows of each, then the rows that are left, block by block."""
    capacity = computation.plan.capacity
    weights = weights.without_others(assignment.groups.sizes.shape[0])
    num_experts, projections, width, hidden = weights.gate_up_proj.shape
    num_pairs = assignment.pair.shape[0]
    wide = topk_weights.dtype
    input_weights, output_weights = _split_weights(computation, topk_weights)

    # A slot beyond its expert's rows holds some row of another expert; nobody looks at its result.
    slots = jnp.minimum(assignment.groups.starts[:, None] + jnp.arange(capacity), num_pairs - 1)
    rows = _rows_of(x, input_weights, assignment.pair[slots.reshape(-1)], assignment)
    rows = rows.reshape(num_experts, capacity, hidden)
    gate_up_proj = weights.gate_up_proj.reshape(num_experts, projections * width, hidden)
    projected = jax.lax.dot_general(gate_up_proj, rows, (((2,), (2,)), ((0,), (0,))), preferred_element_type=wide)
    projected = kept_apart(projected)
    if weights.gate_up_bias is not None:
        projected += weights.gate_up_bias.reshape(num_experts, -1, 1).astype(wide)
    activated = computation.activation(*jnp.split(projected, projections, axis=1)).astype(x.dtype)
    results = jax.lax.dot_general(
        weights.down_proj, activated, (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide
    )
    results = kept_apart(results)
    if weights.down_bias is not None:
        results += weights.down_bias[:, :, None].astype(wide)
    results = results.astype(x.dtype).transpose(0, 2, 1).reshape(num_experts * capacity, hidden)

    expert = jnp.minimum(assignment.expert, num_experts - 1)
    slot = assignment.position - assignment.groups.starts[expert]
    has_slot = assignment.is_local(num_experts) & (slot < capacity)
    total = _combine(results, output_weights, expert * capacity + jnp.minimum(slot, capacity - 1), has_slot)
    return _add_rows_without_slot(computation, total, x, topk_weights, weights, assignment)


def _add_rows_without_slot(computation, total, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """Add the results of the rows beyond each expert's capacity to their tokens' totals."""
    capacity, block_rows = computation.plan.capacity, computation.plan.block_rows
    groups = assignment.groups
    num_pairs, top_k = assignment.pair.shape[0], topk_weights.shape[1]
    if num_pairs <= capacity:
        return total
    left = Groups(groups.starts + capacity, jnp.maximum(groups.sizes - capacity, 0))
    schedule = Schedule.of(left, num_pairs, block_rows)
    pair = jnp.pad(assignment.pair, (0, block_rows))
    input_weights, output_weights = _split_weights(computation, topk_weights)

    def block(index: Array, total: Array) -> Array:
        expert, first = schedule.group[index], schedule.row[index]
        pairs = jax.lax.dynamic_slice_in_dim(pair, first, block_rows)
        output = _apply(computation, _rows_of(x, input_weights, pairs, assignment), weights, expert)
        member = first + jnp.arange(block_rows) < left.starts[expert] + left.sizes[expert]
        weighted = output_weights.reshape(-1)[pairs][:, None] * output.astype(total.dtype)
        return total.at[pairs // top_k].add(jnp.where(member[:, None], weighted, 0))

    return jax.lax.fori_loop(0, schedule.num_blocks, block, total)


def _with_gradient(computation, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """The same from parts that have gradients of their own."""
    num_pairs, num_experts = assignment.pair.shape[0], weights.down_proj.shape[0]
    tiling = tiling_for(num_pairs, num_experts, computation.plan.platform)
    rows = gather_rows(x, assignment)
    if computation.apply_router_weight_on_input:
        rows = (rows * topk_weights.reshape(-1)[assignment.pair][:, None]).astype(x.dtype)
        topk_weights = jnp.ones_like(topk_weights)
    _, projections, width, hidden = weights.gate_up_proj.shape
    gate_up_proj = weights.gate_up_proj.reshape(num_experts, projections * width, hidden)
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias.reshape(num_experts, -1)
    projected = multiply_groups(tiling, x.dtype, rows, gate_up_proj, gate_up_bias, assignment.groups)
    activated = computation.activation(*jnp.split(projected, projections, axis=1))
    results = multiply_groups(tiling, x.dtype, activated, weights.down_proj, weights.down_bias, assignment.groups)
    return combine_rows(results, topk_weights, assignment).astype(x.dtype)


def _split_weights(computation: Computation, topk_weights: Array) -> tuple[Array | None, Array]:
    """Router weights for the input (None: not applied there) and for the output."""
    if computation.apply_router_weight_on_input:
        return topk_weights, jnp.ones_like(topk_weights)
    return None, topk_weights


def _rows_of(
    x: Float[Array, "T H"], input_weights: Array | None, pairs: Int[Array, "rows"], assignment: Assignment
) -> Float[Array, "rows H"]:
    """The tokens of these pairs, multiplied by their router weights if those apply to the input."""
    rows = x[pairs // assignment.position.shape[1]]
    if input_weights is None:
        return rows
    return (rows * input_weights.reshape(-1)[pairs][:, None]).astype(x.dtype)


def _apply(computation: Computation, rows: Array, weights: ExpertWeights, expert: Array) -> Array:
    return apply_expert(rows, weights, expert, computation.activation, computation.plan.slice_bytes)


def _combine(
    results: Float[Array, "rows H"],
    weights: Float[Array, "T K"],
    position: Int[Array, "T K"],
    counts: Array,
) -> Float[Array, "T H"]:
    """Weighted sum of each token's results in the order of its choices; those that don't count may be anything.

    One gather per choice: on CPUs far faster than one gather of [T, K, H] and a sum over K, or a scatter.
    """
    total = jnp.zeros((), weights.dtype)
    for choice in range(position.shape[1]):
        result = weights[:, choice, None] * results[position[:, choice]].astype(weights.dtype)
        total = total + jnp.where(counts[:, choice, None], result, 0)
    return total
