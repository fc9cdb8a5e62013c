"""The TPU kernels that models of published shapes call, with the scalars that choices of experts cause: what is to be compiled."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from moe_jax.aot.targets import TpuTarget
from moe_jax.aot.tpu_calls import TpuKernelCall, tpu_kernel_calls
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape
from moe_jax.kernels import fused_moe, grouped_matmul
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_tpu.matmuls import chosen_for_forward
from moe_jax.kernels.mosaic_tpu.rows_kernel import multiply_rows
from moe_jax.kernels.mosaic_tpu.schedule import VisitTable
from moe_jax.kernels.mosaic_tpu.tiles import RowTiles

TOKENS = (8, 128, 2048, 8192)
PROGRAMS = ("forward", "gradient")
ROUTINGS = ("uniform", "zipf")
Tiling = tuple[int, int, int]
"""Rows, contracted columns and columns of a tile."""


@functools.cache
def chosen_experts(model: str, tokens: int, routing: str) -> np.ndarray:
    """K different experts for each token; experts are equally likely, or as by Zipf's law, in an order of no meaning."""
    shape = EXPERT_SHAPES[model]
    rng = np.random.default_rng(0)
    ranks = rng.permutation(shape.num_experts) + 1.0
    logits = -np.log(ranks) if routing == "zipf" else np.zeros(shape.num_experts)
    noise = rng.gumbel(size=(tokens, shape.num_experts))
    return np.argsort(-(logits + noise), axis=1)[:, : shape.top_k].astype(np.int32)


def group_sizes(model: str, tokens: int, routing: str) -> np.ndarray:
    """Rows of each expert at hand."""
    local = EXPERT_SHAPES[model].local_experts
    found = chosen_experts(model, tokens, routing)
    return np.bincount(found[found < local], minlength=local)


def traced_experts(target: TpuTarget, model: str, tokens: int, program: str) -> ClosedJaxpr:
    """The expert computation, forward or with its gradient; its first argument are the ids of the chosen experts."""
    shape = EXPERT_SHAPES[model]
    arguments = shape.fused_moe_arguments(tokens)
    ids = arguments.pop("topk_ids")
    assert ids is not None
    leaves, structure = jax.tree.flatten(arguments)

    def forward(ids: jax.Array, *leaves: jax.Array) -> jax.Array:
        floating = jax.tree.unflatten(structure, leaves)
        return fused_moe(
            **floating,
            topk_ids=ids,
            activation=shape.activation,
            expected_rows=shape.expected_rows(tokens),
            implementation="pallas_tpu",
        )

    def gradient(ids: jax.Array, *leaves: jax.Array) -> Any:
        result, backward = jax.vjp(functools.partial(forward, ids), *leaves)
        return backward(result)

    with target.lowering():
        return jax.make_jaxpr({"forward": forward, "gradient": gradient}[program])(ids, *leaves)


def experts_calls(target: TpuTarget, model: str, tokens: int, program: str) -> dict[str, tuple[TpuKernelCall, ...]]:
    """The kernels of the expert computation, forward or with its gradient, for each routing."""
    traced = traced_experts(target, model, tokens, program)
    return {
        routing: tpu_kernel_calls(traced, {0: jnp.asarray(chosen_experts(model, tokens, routing))})
        for routing in ROUTINGS
    }


def matmul_calls(
    target: TpuTarget, model: str, tokens: int, program: str, tiling: Tiling | None
) -> dict[str, TpuKernelCall]:
    """Gate and up of a model as one grouped matmul of [I gates, I ups], for each routing.

    Args:
        target: what to compile for.
        model: name of a shape.
        tokens: from which the rows of groups follow.
        program: "grouped" is ours, "full units" too, but with the tiles that it chooses for itself it never multiplies fewer rows
            at once than a matrix unit has; "megablox" is jax's.
        tiling: of a tile; None: what we choose.
    """
    shape = EXPERT_SHAPES[model]
    sizes = {routing: group_sizes(model, tokens, routing) for routing in ROUTINGS}
    # Both routings take the same program, which has room for the rows of either.
    rows = math.ceil(max(found.sum() for found in sizes.values()) / 256) * 256
    operands = (
        jax.ShapeDtypeStruct((rows, shape.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.local_experts, matmul_columns(shape), shape.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.local_experts,), jnp.int32),
    )
    with target.lowering():
        traced = jax.make_jaxpr(functools.partial(_multiplication, target, program, tiling))(*operands)
    calls = {}
    for routing, found in sizes.items():
        (calls[routing],) = tpu_kernel_calls(traced, {2: jnp.asarray(found, jnp.int32)})
    return calls


def matmul_columns(shape: ExpertShape) -> int:
    """Columns of the product that `matmul_calls` computes."""
    return (2 if shape.activation.is_gated else 1) * shape.intermediate_size


def _multiplication(
    target: TpuTarget, program: str, tiling: Tiling | None, rows: Any, weights: Any, sizes: Any
) -> jax.Array:
    if program == "megablox":
        from jax.experimental.pallas.ops.tpu.megablox import gmm

        return gmm(rows, weights, sizes, preferred_element_type=rows.dtype, tiling=tiling, transpose_rhs=True)
    if program == "grouped" and tiling is None:
        return grouped_matmul(rows, weights, sizes, implementation="pallas_tpu")
    matrices = weights[:, None]
    if tiling is None:
        kernel, chosen = chosen_for_forward(rows.shape[0], matrices.shape, rows.dtype, rows.dtype, target.device)
        if kernel != "rows":
            raise ValueError("weights are streamed past rows this few: the number multiplied at once is no choice")
        tiles, unit = chosen.tiles, target.device.mxu_size
        chunk = max(tiles.chunk, unit)
        tiles = dataclasses.replace(
            tiles, rows=max(tiles.rows, chunk), chunk=chunk, least=max(tiles.least, unit), most=max(tiles.most, chunk)
        )
    else:
        tile_rows, contracted, columns = tiling
        if contracted < rows.shape[1]:
            raise ValueError("the contracted dimension is never cut")
        chunk = min(tile_rows, max(128, target.device.mxu_size))
        least = min(chunk, 128)
        tiles = RowTiles(rows=tile_rows, columns=columns, chunk=chunk, remainder=64, least=least, most=2 * chunk - 64)
    table = VisitTable.of(Groups(jnp.cumsum(sizes) - sizes, sizes), rows.shape[0], tiles.rows)
    return multiply_rows(rows, matrices, table, tiles=tiles, output_dtype=rows.dtype, device=target.device)[0]


def useful_multiplies(model: str, tokens: int, routing: str, call: TpuKernelCall) -> float:
    """Products of numbers that the rows of local experts need, of the matrices that the call has."""
    matrices = [array.shape for array in (*call.operands, *call.results) if len(array.shape) > 2]
    return float(group_sizes(model, tokens, routing).sum()) * math.prod(matrices[0][1:])
