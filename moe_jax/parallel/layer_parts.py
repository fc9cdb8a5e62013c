"""The parts of a layer that run on its ranks: routed experts, shared experts, and the sums over ranks.

Between these the *partial results* are an ordinary array `[ranks, T, ...]`, its first axis split over the ranks that hold the same
tokens, so the order in which they are scaled, added and summed stays the runner's, written down once.
"""

import dataclasses
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
from moe_jax.parallel.dispatch import DispatchSettings, LocalExperts, ReceivedRows, Strategy, tensor_exchanged
from moe_jax.parallel.sharding import expert_weight_specs, fused_shared_expert_specs, shared_expert_spec


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where tokens, and the parts of their results, are."""

    tokens: tuple[str, ...]
    """Axes over which tokens are split."""
    partial: tuple[str, ...]
    """Axes whose ranks hold parts of the same tokens' results."""

    @classmethod
    def of(cls, axes: LayerAxes, *, sliced: bool) -> "TokenLayout":
        """The layer's own layout, or the one in which ranks that hold the same tokens have divided them."""
        if not sliced:
            return cls(axes.tokens, axes.partial)
        return cls(axes.tokens + axes.sliced, tuple(name for name in axes.partial if name not in axes.sliced))


@dataclasses.dataclass(frozen=True)
class RoutedDispatch:
    """One strategy with its settings: a static argument under `jax.jit`."""

    strategy: Strategy
    settings: DispatchSettings
    micro_batches: int = 1

    @property
    def axes(self) -> LayerAxes:
        """The layer's axes."""
        return self.settings.axes

    @property
    def layout(self) -> TokenLayout:
        """Where the results of the routed experts are."""
        return TokenLayout.of(self.axes, sliced=self.strategy.SLICES_TOKENS)

    def pad_tokens(self, rows: Array, fill: int = 0) -> Array:
        """Append rows until every rank, and every micro-batch, has equally many, and at least one."""
        missing = -max(1, rows.shape[0]) % (self.axes.size(self.layout.tokens) * self.micro_batches)
        missing += rows.shape[0] == 0
        return jnp.pad(rows, ((0, missing), (0, 0)), constant_values=fill) if missing else rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedResult:
    """What the routed experts return."""

    partials: Float[Array, "ranks Tpadded H"]
    """Each rank's part, in the layout of the dispatch."""
    sent_rows: Int[Array, "token_ranks"]
    """Rows that each rank with tokens of its own has sent to others."""
    dropped_rows: Int[Array, ""]
    """Choices that found no room."""


@functools.partial(jax.jit, static_argnames=("dispatch", "compute"))
def routed_partials(
    dispatch: RoutedDispatch,
    compute: ExpertComputation,
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    weights: ExpertWeights,
    shared: ExpertWeights | None = None,
) -> RoutedResult:
    """Dispatch tokens, run the experts where they are, and bring the results back. Ids are physical ones.

    `shared` are shared experts as one wide expert, if the strategy is a `WithFusedSharedExperts`.
    """
    axes, layout, strategy, settings = dispatch.axes, dispatch.layout, dispatch.strategy, dispatch.settings

    def on_rank(x, topk_weights, topk_ids, weights, shared):
        if shared is not None:
            weights = weights.followed_by(shared)
        if weights.down_bias is not None:
            # Every tensor rank holds the whole bias, which must enter the sum once.
            weights = weights._replace(down_bias=jnp.where(axes.is_first(axes.tensor), weights.down_bias, 0))
        # The halves don't depend on each other, which leaves the compiler free to overlap them.
        halves = zip(*(jnp.split(array, dispatch.micro_batches) for array in (x, topk_weights, topk_ids)), strict=True)
        experts = LocalExperts(settings, compute, weights)
        received, sent = zip(*(strategy.dispatch(settings, *half) for half in halves), strict=True)
        returned = [
            strategy.send_back(settings, experts(rows), kept) for rows, kept in zip(received, sent, strict=True)
        ]
        results = [
            strategy.combine(settings, half, kept, experts, returned) for half, kept in zip(returned, sent, strict=True)
        ]
        sent_rows, dropped_rows = _counts(axes, layout, received)
        return RoutedResult(jnp.concatenate(results)[None], sent_rows, dropped_rows)

    rows = axes.spec(layout.tokens, ())
    specs = _specs_of(weights, expert_weight_specs(axes))
    shared_specs = None if shared is None else _specs_of(shared, fused_shared_expert_specs(axes))
    result_specs: Any = (_partial_spec(axes, layout), axes.spec(), axes.spec())  # specs stand where arrays will
    arrays = dispatch.pad_tokens(x), dispatch.pad_tokens(topk_weights), dispatch.pad_tokens(topk_ids, fill=-1)
    in_specs = (rows, rows, rows, specs, shared_specs)
    return axes.shard_map(on_rank, in_specs, RoutedResult(*result_specs))(*arrays, weights, shared)


def _specs_of(weights: ExpertWeights, specs: ExpertWeights) -> ExpertWeights:
    """`specs` of the arrays that there are; the layers of a stack are on all ranks."""
    given = ExpertWeights._make(None if array is None else spec for array, spec in zip(weights, specs, strict=True))
    if weights.layer is None:
        return given
    matrices = {name: PartitionSpec(None, *getattr(specs, name)) for name in ("gate_up_proj", "down_proj")}
    specs_of_stack: Any = {**matrices, "layer": PartitionSpec()}
    return given._replace(**specs_of_stack)


def _counts(axes: LayerAxes, layout: TokenLayout, received: tuple[ReceivedRows, ...]) -> tuple[Array, Array]:
    """Rows sent by each rank with tokens, and choices that all of them together have dropped."""
    sent = jnp.sum(jnp.stack([part.sent_rows for part in received]), axis=0, dtype=jnp.int32)[None]
    dropped = jnp.sum(jnp.stack([part.dropped_rows for part in received]), axis=0, dtype=jnp.int32)
    if not layout.tokens:
        return sent, dropped
    # Ranks that exchange tensors dispatch each other's tokens as well, and each of them counts what is dropped of these.
    dropped = jax.lax.psum(dropped, layout.tokens) // axes.size(tensor_exchanged(axes))
    return jax.lax.all_gather(sent, layout.tokens, tiled=True), dropped


def shared_partials(
    dispatch: RoutedDispatch, shared_experts: SharedExperts, x: Float[Array, "T D"]
) -> Float[Array, "ranks Tpadded D"]:
    """Each rank's part of the shared experts' output, in the layer's own layout; padded as for `dispatch`."""
    graph, state = nnx.split(shared_experts)
    return _shared_partials(dispatch, graph, state, x)


@functools.partial(jax.jit, static_argnames=("dispatch", "graph"))
def _shared_partials(dispatch: RoutedDispatch, graph: nnx.GraphDef, state: nnx.State, x: Array) -> Array:
    axes, layout = dispatch.axes, TokenLayout.of(dispatch.axes, sliced=False)

    def on_rank(x, state):
        local = nnx.merge(graph, state)
        if local.down_proj.bias is not None:
            # Every rank holds the whole bias, which must enter the sum once.
            local.down_proj.bias[...] = jnp.where(axes.is_first(layout.partial), local.down_proj.bias[...], 0)
        return local(x)[None]

    specs = nnx.map_state(lambda path, _: shared_expert_spec(axes, path), state)
    in_specs = (axes.spec(layout.tokens, ()), specs)
    return axes.shard_map(on_rank, in_specs, _partial_spec(axes, layout))(dispatch.pad_tokens(x), state)


@functools.partial(jax.jit, static_argnames=("axes", "given", "wanted", "num_tokens"))
def sum_over_ranks(
    axes: LayerAxes,
    partials: Float[Array, "ranks Tpadded D"],
    given: TokenLayout,
    wanted: TokenLayout,
    num_tokens: int,
) -> Float[Array, "T D"]:
    """Partial results summed, in their dtype, without the rows that padding added.

    Args:
        axes: of the layer.
        partials: in the layout `given`.
        given: where the parts are.
        wanted: where tokens are to be afterwards; over axes that `given` does not split them over, each rank gets its slice.
        num_tokens: rows that are not padding.
    """
    scattered = tuple(name for name in wanted.tokens if name not in given.tokens)
    summed = tuple(name for name in given.partial if name not in scattered)

    def on_rank(partial):
        rows = partial[0]
        if scattered:
            rows = jax.lax.psum_scatter(rows, scattered, tiled=True)
        return jax.lax.psum(rows, summed) if summed else rows

    return axes.shard_map(on_rank, (_partial_spec(axes, given),), axes.spec(wanted.tokens, ()))(partials)[:num_tokens]


def slice_tokens(dispatch: RoutedDispatch, rows: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The same rows, divided among ranks that hold the same tokens if the strategy is going to do that, and evenly.

    Routing and transforms then happen on one rank for each token, too.
    """
    axes, layout = dispatch.axes, dispatch.layout
    if not dispatch.strategy.SLICES_TOKENS or not axes.sliced or rows.shape[0] % axes.size(layout.tokens):
        return rows
    split = axes.spec(layout.tokens, ())
    return axes.shard_map(lambda rows: rows, (split,), split)(rows)


@functools.partial(jax.jit, static_argnames=("dispatch",))
def gather_slices(dispatch: RoutedDispatch, rows: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """Tokens that ranks have divided among them, gathered on each of them again."""
    axes = dispatch.axes
    if not dispatch.strategy.SLICES_TOKENS or not axes.sliced:
        return rows

    def on_rank(rows):
        return jax.lax.all_gather(rows, axes.sliced, tiled=True)

    in_specs = (axes.spec(dispatch.layout.tokens, ()),)
    return axes.shard_map(on_rank, in_specs, axes.spec(axes.tokens, ()))(dispatch.pad_tokens(rows))[: rows.shape[0]]


def _partial_spec(axes: LayerAxes, layout: TokenLayout) -> PartitionSpec:
    return axes.spec(layout.partial, layout.tokens, ())
