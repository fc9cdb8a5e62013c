"""Expert and tensor parallelism with replicated tokens: each rank computes its share for all, and shares are summed.

Nothing is dispatched. A rank runs the experts of its expert position, each cut to its slice of the intermediate size,
and its slice of the shared experts; the sum over the ranks is the layer's output. Between the two steps the *partial
results* are an ordinary array `[ranks, T, ...]` split over the reduce axes, so the order in which they are scaled,
added and summed stays the runner's, written down once. Tokens may be split over data axes; no rank ever sees another
data position's tokens.

Source: spec 1.4, 1.8; vLLM's tensor- and expert-parallel path without all-to-all kernels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax.experts.routed import ExpertComputation
from moe_jax.experts.shared import SharedExperts
from moe_jax.experts.weights import ExpertWeights
from moe_jax.parallel.axes import LayerAxes


def expert_weight_specs(axes: LayerAxes) -> ExpertWeights:
    """How `ExpertWeights` are split: experts over the expert axes, intermediate size over the tensor axes."""
    spec: Any = axes.spec  # a spec stands where an array will
    return ExpertWeights(
        gate_up_proj=spec(axes.expert, (), axes.tensor, ()),
        down_proj=spec(axes.expert, (), axes.tensor),
        gate_up_bias=spec(axes.expert, (), axes.tensor),
        down_bias=spec(axes.expert, ()),
    )


def shared_expert_spec(axes: LayerAxes, path: tuple[Any, ...]) -> PartitionSpec:
    """How the parameter of `SharedExperts` at `path` is split: the intermediate size over all ranks."""
    return {
        ("gate_proj", "kernel"): axes.spec((), axes.reduce),
        ("up_proj", "kernel"): axes.spec((), axes.reduce),
        ("down_proj", "kernel"): axes.spec(axes.reduce, ()),
        ("gate_proj", "bias"): axes.spec(axes.reduce),
        ("up_proj", "bias"): axes.spec(axes.reduce),
    }.get(tuple(path), PartitionSpec())


@functools.partial(jax.jit, static_argnames=("axes", "compute"))
def routed_partials(
    axes: LayerAxes,
    compute: ExpertComputation,
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "ranks Tpadded H"]:
    """Each rank's part of the routed output."""

    def on_rank(x, topk_weights, topk_ids, weights):
        if weights.down_bias is not None:
            # Every tensor rank holds the whole bias, which must enter the sum once.
            weights = weights._replace(down_bias=jnp.where(axes.is_first(axes.tensor), weights.down_bias, 0))
        first_expert = axes.position(axes.expert) * weights.gate_up_proj.shape[0] if axes.expert else None
        return compute(x, topk_weights, topk_ids, weights, first_expert)[None]

    rows = axes.spec(axes.data, ())
    given = zip(weights, expert_weight_specs(axes), strict=True)
    specs = ExpertWeights._make(None if array is None else spec for array, spec in given)
    return axes.shard_map(on_rank, (rows, rows, rows, specs), _partial_spec(axes))(
        _pad_tokens(axes, x), _pad_tokens(axes, topk_weights), _pad_tokens(axes, topk_ids, fill=-1), weights
    )


def shared_partials(
    axes: LayerAxes, shared_experts: SharedExperts, x: Float[Array, "T D"]
) -> Float[Array, "ranks Tpadded D"]:
    """Each rank's part of the shared experts' output."""
    graph, state = nnx.split(shared_experts)
    return _shared_partials(axes, graph, state, x)


@functools.partial(jax.jit, static_argnames=("axes", "graph"))
def _shared_partials(axes: LayerAxes, graph: nnx.GraphDef, state: nnx.State, x: Array) -> Array:
    def on_rank(x, state):
        local = nnx.merge(graph, state)
        if local.down_proj.bias is not None:
            # Every rank holds the whole bias, which must enter the sum once.
            local.down_proj.bias[...] = jnp.where(axes.is_first(axes.reduce), local.down_proj.bias[...], 0)
        return local(x)[None]

    specs = nnx.map_state(lambda path, _: shared_expert_spec(axes, path), state)
    return axes.shard_map(on_rank, (axes.spec(axes.data, ()), specs), _partial_spec(axes))(_pad_tokens(axes, x), state)


@functools.partial(jax.jit, static_argnames=("axes", "num_tokens"))
def sum_over_ranks(axes: LayerAxes, partials: Float[Array, "ranks Tpadded D"], num_tokens: int) -> Float[Array, "T D"]:
    """The all-reduce of partial results, in their dtype, without the rows that padding added."""

    def on_rank(partial):
        return jax.lax.psum(partial[0], axes.reduce)

    return axes.shard_map(on_rank, (_partial_spec(axes),), axes.spec(axes.data, ()))(partials)[:num_tokens]


def _partial_spec(axes: LayerAxes) -> PartitionSpec:
    return axes.spec(axes.reduce, axes.data, ())


def _pad_tokens(axes: LayerAxes, rows: Array, fill: int = 0) -> Array:
    """Append rows until every data position has equally many."""
    missing = -rows.shape[0] % axes.size(axes.data)
    return jnp.pad(rows, ((0, missing), (0, 0)), constant_values=fill) if missing else rows
