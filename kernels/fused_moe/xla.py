"""The fused MoE block from ordinary XLA operations. For CPUs, and any accelerator without a kernel.

Three formulations, chosen from static shapes by `plan`:

- *streamed*, on CPUs: every pair of a token and an expert by itself, reading the expert's weights in place (`streamed.py`).
- *batched*: every expert gets as many slots, and one batched matmul reads the weights in place, without a copy. Rows that find
  no slot are computed block by block afterwards and added: in large blocks as far as these are full, the rest of each expert's
  in small ones. Even routing wants slots for nearly all rows, skewed routing fewer; the rows at hand decide among a few numbers.
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
from ..assignment import Assignment
from ..grouped_matmul.blocks import Schedule
from ..grouped_matmul.xla import multiply_groups, tiling_for
from ..groups import Groups
from ..selection import Formulation
from ..sum_of_choices import sum_of_choices
from ..varying import varying_like
from .expert_block import ExpertMatrices, apply_expert, unweighted_dtype
from .expert_slots import apply_experts, slots_for, slots_within
from .request import Request
from .streamed import apply_expert_to_row

NAME = "xla"


class Plan(NamedTuple):
    """How to compute, from static shapes: hashable, so that it can be a static argument."""

    formulation: Literal["streamed", "batched", "loop"]
    """See the module's description."""
    capacities: tuple[int, ...]
    """Slots per expert of the batched formulation: the numbers among which the rows at hand decide."""
    block_rows: int
    """Rows per block of the loop, and of the small blocks of rows that find no slot."""
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


_MOST_ROWS_PER_BLOCK = 64
"""Larger blocks compute too many rows in vain, smaller ones copy an expert's weights too often."""
_LARGE_BLOCK = 4
"""Small blocks in a large one, which copies weights once."""
_ROWS_PER_COPY = 64
"""Rows whose products take as long as copying an expert's weights for a block does."""
_ROWS_PER_COPY_OF_TWO_BYTES = 160
"""The same for elements of two bytes, whose products are faster by more than their copies are."""


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
        return Plan("streamed" if on_cpu else "loop", (), 8, slice_bytes, request.platform), why
    # Two standard deviations above the mean of random routing: most experts need no more.
    itemsize = request.x.dtype.itemsize
    usual_rows = slots_for(math.ceil(mean + 2 * math.sqrt(mean)), itemsize)
    fewer = {slots_within(int(mean / part), itemsize) for part in (1, 2, 4)}
    capacities = (usual_rows, *sorted((slots for slots in fewer if 16 <= slots < usual_rows), reverse=True))
    why = f"{spread}: computing the slots that stay empty costs less than copying the weights"
    return Plan("batched", capacities, min(usual_rows, _MOST_ROWS_PER_BLOCK), slice_bytes, request.platform), why


def formulation(request: Request) -> Formulation:
    """What `plan` chose."""
    chosen, why = plan(request)
    if chosen.formulation == "streamed":
        return Formulation("streamed, one row of one expert at a time", why)
    slices = f"slices of at most {chosen.slice_bytes / 2**20:.3g} MiB of a matrix"
    if chosen.formulation == "batched":
        blocks = f"rows without a slot in blocks of {_LARGE_BLOCK * chosen.block_rows} and {chosen.block_rows} rows"
        slots = " or ".join(map(str, chosen.capacities))
        return Formulation(f"batched with {slots} slots per expert, {blocks}, {slices}", why)
    return Formulation(f"loop over blocks of {chosen.block_rows} rows, {slices}", why)


def run(request: Request) -> Array:
    """Compute; differentiable in everything floating."""
    if request.x.size == 0:
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
    weights: ExpertMatrices,
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
    is_local = assignment.is_local(num_experts)

    def result_of(pair: Array | int, expert: Array) -> Float[Array, "H"]:
        row = _rows_of(x, input_weights, jnp.asarray(pair)[None], assignment)[0]
        return apply_expert_to_row(row, weights, expert, computation.activation)

    if num_tokens * top_k <= _MOST_PAIRS_UNROLLED:
        experts = jnp.minimum(assignment.expert, num_experts - 1).reshape(-1)
        results = jnp.stack([result_of(pair, experts[pair]) for pair in range(num_tokens * top_k)])
        order = jnp.arange(num_tokens * top_k).reshape(num_tokens, top_k)
        return sum_of_choices(results, order, weights=output_weights, counts=is_local)

    def one_pair(index: Array, results: Array) -> Array:
        pair = assignment.pair[index]
        result = result_of(pair, assignment.expert.reshape(-1)[pair])
        return jax.lax.dynamic_update_index_in_dim(results, result, index, 0)

    nothing = varying_like(jnp.zeros((num_tokens * top_k, x.shape[1]), topk_weights.dtype), topk_weights)
    num_local = jnp.sum(assignment.groups.sizes)
    results = jax.lax.fori_loop(0, num_local, one_pair, nothing)
    return sum_of_choices(results, assignment.position, weights=output_weights, counts=is_local)


def _loop(computation, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """Block by block."""
    block_rows = computation.plan.block_rows
    input_weights, output_weights = _split_weights(computation, topk_weights)
    results = _no_results(x, topk_weights, assignment, block_rows)
    results = _in_blocks(computation, results, x, input_weights, weights, assignment, assignment.groups, block_rows)
    is_local = assignment.is_local(assignment.groups.sizes.shape[0])
    return sum_of_choices(results, assignment.position, weights=output_weights, counts=is_local)


def _no_results(x, topk_weights, assignment, block_rows: int) -> Float[Array, "rows H"]:
    """Room for the results of all sorted rows, and for the surplus rows of a block."""
    shape = (assignment.pair.shape[0] + block_rows, x.shape[1])
    return varying_like(jnp.zeros(shape, unweighted_dtype(x.dtype)), topk_weights)


def _in_blocks(
    computation, results, x, input_weights, weights, assignment, groups: Groups, block_rows: int
) -> Float[Array, "rows H"]:
    """`results` with those of `groups`, which are rows of one expert each.

    A block's surplus rows, which belong to the next expert, are overwritten by the blocks that follow.
    """
    schedule = Schedule.of(groups, assignment.pair.shape[0], block_rows)
    pair = jnp.pad(assignment.pair, (0, block_rows))

    def block(index: Array, results: Array) -> Array:
        first = schedule.row[index]
        pairs = jax.lax.dynamic_slice_in_dim(pair, first, block_rows)
        rows = _rows_of(x, input_weights, pairs, assignment)
        output = _apply(computation, rows, weights, schedule.group[index])
        return jax.lax.dynamic_update_slice_in_dim(results, output, first, axis=0)

    return jax.lax.fori_loop(0, schedule.num_blocks, block, results)


def _batched(computation, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """All experts at once, with the number of slots that takes least time for these rows."""
    plan = computation.plan
    branches = [functools.partial(_with_capacity, computation, capacity) for capacity in plan.capacities]
    operands = (x, topk_weights, weights, assignment)
    if len(branches) == 1:
        return branches[0](*operands)
    sizes = assignment.groups.sizes
    rows_per_copy = _ROWS_PER_COPY if x.dtype.itemsize >= 4 else _ROWS_PER_COPY_OF_TWO_BYTES
    costs = [rows_computed(sizes, capacity, plan.block_rows, rows_per_copy) for capacity in plan.capacities]
    return jax.lax.switch(jnp.argmin(jnp.stack(costs)), branches, *operands)


def rows_computed(sizes: Int[Array, "E"], capacity: int, small: int, rows_per_copy: int) -> Int[Array, ""]:
    """Rows of which the products take as long as all slots, and blocks for rows that find none, with their copies of weights."""
    left = jnp.maximum(sizes - capacity, 0)
    num_large = left // (_LARGE_BLOCK * small)
    num_small = -(-(left - num_large * _LARGE_BLOCK * small) // small)
    in_blocks = (num_large * _LARGE_BLOCK + num_small) * small + (num_large + num_small) * rows_per_copy
    return sizes.shape[0] * capacity + jnp.sum(in_blocks)


def _with_capacity(computation, capacity, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """The first `capacity` rows of each expert at once, then the rows that are left, block by block."""
    weights = weights.without_others(assignment.groups.sizes.shape[0])
    num_experts, num_pairs = weights.down_proj.shape[0], assignment.pair.shape[0]
    input_weights, output_weights = _split_weights(computation, topk_weights)

    # A slot beyond its expert's rows holds some row of another expert; nobody looks at its result.
    slots = jnp.minimum(assignment.groups.starts[:, None] + jnp.arange(capacity), num_pairs - 1)
    rows = _rows_of(x, input_weights, assignment.pair[slots.reshape(-1)], assignment)
    results = apply_experts(rows.reshape(num_experts, capacity, -1), weights, computation.activation)
    results = results.reshape(num_experts * capacity, -1)

    expert = jnp.minimum(assignment.expert, num_experts - 1)
    slot = assignment.position - assignment.groups.starts[expert]
    has_slot = assignment.is_local(num_experts) & (slot < capacity)
    position = expert * capacity + jnp.minimum(slot, capacity - 1)
    total = sum_of_choices(results, position, weights=output_weights, counts=has_slot)
    return _add_rows_without_slot(computation, capacity, total, x, topk_weights, weights, assignment)


def _add_rows_without_slot(computation, capacity, total, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """Add the results of the rows beyond each expert's capacity to their tokens' totals."""
    small = computation.plan.block_rows
    large = _LARGE_BLOCK * small
    groups = assignment.groups
    num_pairs, num_experts = assignment.pair.shape[0], groups.sizes.shape[0]
    if num_pairs <= capacity:
        return total
    left = Groups(groups.starts + capacity, jnp.maximum(groups.sizes - capacity, 0))
    in_large = left.sizes // large * large
    input_weights, output_weights = _split_weights(computation, topk_weights)
    compute = functools.partial(_in_blocks, computation)
    operands = (x, input_weights, weights, assignment)

    def add(total: Array) -> Array:
        results = _no_results(x, topk_weights, assignment, large)
        # Small blocks first: the last one of an expert reaches beyond its rows, a large one does not.
        results = compute(results, *operands, Groups(left.starts + in_large, left.sizes - in_large), small)
        results = compute(results, *operands, Groups(left.starts, in_large), large)
        slot = assignment.position - groups.starts[jnp.minimum(assignment.expert, num_experts - 1)]
        has_none = assignment.is_local(num_experts) & (slot >= capacity)
        return total + sum_of_choices(results, assignment.position, weights=output_weights, counts=has_none)

    return jax.lax.cond(jnp.any(left.sizes > 0), add, lambda total: total, total)


def _with_gradient(computation, x, topk_weights, weights, assignment) -> Float[Array, "T H"]:
    """The same from parts that have gradients of their own."""
    num_pairs, num_experts = assignment.pair.shape[0], weights.down_proj.shape[0]
    tiling = tiling_for(num_pairs, num_experts, computation.plan.platform)
    rows = assignment.rows.gather(x)
    if computation.apply_router_weight_on_input:
        rows = (rows * topk_weights.reshape(-1)[assignment.pair][:, None]).astype(x.dtype)
        topk_weights = jnp.ones_like(topk_weights)
    _, projections, width, hidden = weights.gate_up_proj.shape
    gate_up_proj = weights.gate_up_proj.reshape(num_experts, projections * width, hidden)
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias.reshape(num_experts, -1)
    dtype = unweighted_dtype(x.dtype)
    projected = multiply_groups(tiling, dtype, rows, gate_up_proj, gate_up_bias, assignment.groups)
    activated = computation.activation(*jnp.split(projected, projections, axis=1)).astype(x.dtype)
    results = multiply_groups(tiling, dtype, activated, weights.down_proj, weights.down_bias, assignment.groups)
    return assignment.rows.combine(results, topk_weights).astype(x.dtype)


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


def _apply(computation: Computation, rows: Array, weights: ExpertMatrices, expert: Array) -> Array:
    return apply_expert(rows, weights, expert, computation.activation, computation.plan.slice_bytes)
