"""The Mixture-of-Experts layer."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import reprlib
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.experts import RoutedExperts, SharedExperts
from moe_jax.kernels import Choice
from moe_jax.parallel import LayerAxes
from moe_jax.parallel.choice import choose_strategy
from moe_jax.parallel.dispatch import DispatchRequest
from moe_jax.parallel.fused_shared_experts import WithFusedSharedExperts
from moe_jax.parallel.layer_parts import (
    RoutedDispatch,
    RoutedResult,
    TokenLayout,
    gather_slices,
    routed_partials,
    shared_partials,
    slice_tokens,
    sum_over_ranks,
)
from moe_jax.placement import ExpertMapManager
from moe_jax.routing import Router, append_fused_shared_experts, checked_choice, split_zero_experts
from moe_jax.runner.aux import MoEAux, count_expert_load
from moe_jax.runner.built_for import check_built_for, check_can_be_split
from moe_jax.runner.fused_shared_experts import check_fused_shared_experts
from moe_jax.runner.interface import LayerInputs, MoERunnerInterface
from moe_jax.runner.on_mesh import partition_spec, place_parts, result_shardings
from moe_jax.runner.physical_experts import expert_map_manager, initial_placement, initial_replicas, resolve_axes
from moe_jax.runner.plans import ReductionPlan, ScalingPlan
from moe_jax.runner.token_order import TokenOrder
from moe_jax.runner.token_shapes import check_hidden_states, check_routed_input, check_same_tokens

Transform = Callable[[Array], Any]
"""`f(x [T, H])` -> `[T, H']`, or a tuple whose first element is that (an `nnx.Module` or a function)."""


class MoERunner(MoERunnerInterface):
    """Router, routed experts, shared experts and transforms, run in the order of vLLM's runner (spec 1.4 and 1.5).

    1. `routed_input_transform` gives the routed path its input; shared experts keep the original hidden states. A
       caller who passes `shared_experts_input` has applied the transform already, so it is skipped.
    2. The router turns the routed input, or the caller's `router_logits`, into weights and logical ids; tokens that
       `token_mask` leaves out get none; redundant experts turn logical ids into physical ones.
    3. Routed and shared experts run, or with `config.fuse_shared_experts` all of them in one computation; the two plans say
       where their outputs are scaled and summed over the ranks.
    4. `routed_output_transform`, then the shared output is added, then the zero experts' part: the routed input times
       the weight that its zero experts got.

    Every part may be replaced after construction; transforms and shared experts by a module, a function or None. The plans are
    derived from the parts that are there, and parts with which they cannot be kept are refused by the next call.

    Attributes:
        router: hidden states -> weights and ids.
        routed_experts: the experts' weights and computation.
        shared_experts: dense experts that every token passes, or None.
        replicas: placement of redundant experts, or None when there are none.
        routed_input_transform: applied to the routed path's input, or None.
        routed_output_transform: applied to the routed output before the shared output is added, or None.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        rngs: nnx.Rngs,
        router: Callable[..., Any] | None = None,
        routed_experts: RoutedExperts | None = None,
        shared_experts: Callable[[Array], Array] | None = None,
        routed_input_transform: Transform | None = None,
        routed_output_transform: Transform | None = None,
        mesh: Mesh | None = None,
    ):
        """Put a layer together; parts that are not given are created from the config.

        Args:
            config: sizes, routing, shared experts, parallel axes and number formats.
            rngs: source of the `params` keys of the parts created here.
            router: called like `Router`; one without a `weight` needs `router_logits` in every call.
            routed_experts: experts that exist already.
            shared_experts: a dense module that exists already, in place of `config.shared_experts`.
            routed_input_transform: latent projection of the routed path (spec 1.4 step 1).
            routed_output_transform: its way back, applied before the shared output is added.
            mesh: devices over which `config.parallel` splits the layer; parameters created here are placed on it.

        Raises:
            ValueError: the scaling plan cannot be kept; the config names mesh axes without a mesh, axes that the mesh
                lacks, or ranks that do not divide the layer; shared experts that cannot be split over ranks; a router or
                experts that were built for another config.
            NotImplementedError: the dispatch strategy that the config names, or every one, cannot run on the mesh.
        """
        parts = {"router": router, "routed_experts": routed_experts, "shared_experts": shared_experts}
        self.config = config
        self.axes = resolve_axes(config, mesh)
        self.router = Router(config, rngs=rngs) if router is None else router
        if routed_experts is None:
            routed_experts = RoutedExperts(config, placement=initial_placement(config, self.axes), rngs=rngs)
        self.routed_experts = routed_experts
        if shared_experts is None and config.shared_experts is not None:
            shared_experts = SharedExperts(config, rngs=rngs)
        self.shared_experts = shared_experts
        self.replicas = nnx.data(initial_replicas(config, self.axes))
        self.routed_input_transform = routed_input_transform
        self.routed_output_transform = routed_output_transform
        check_built_for(config, self.router, self.routed_experts, has_mesh=mesh is not None)
        self.check_parts()
        if self.axes is not None:
            made_here = [name for name, given in parts.items() if given is None]
            place_parts(self, self.axes.mesh, [*made_here, "replicas"])

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _as_part(value) if name in _REPLACEABLE else value)

    @property
    def is_internal_router(self) -> bool:
        """Whether the router holds the gate's weight; otherwise every call must bring `router_logits`."""
        return getattr(self.router, "weight", None) is not None

    @property
    def _separate_shared_experts(self) -> Any:
        """The shared experts that run beside the routed ones, not among them."""
        return None if self.config.fuse_shared_experts else self.shared_experts

    @property
    def scaling_plan(self) -> ScalingPlan:
        """Who applies `routed_scaling_factor`."""
        return ScalingPlan.of(self.config, has_shared_experts=self._separate_shared_experts is not None)

    @property
    def reduction_plan(self) -> ReductionPlan:
        """Who sums the ranks' partial results, and when.

        Where `config.parallel.strategy` is None, of a strategy that leaves tokens on the ranks that hold them; one that
        divides them may be chosen for many tokens, and gives the same results.
        """
        if self.axes is None or self.config.parallel.strategy is None:
            return self._reduction_plan(None)
        return self._reduction_plan(self._dispatch(self.axes, num_tokens=1))

    def _reduction_plan(self, dispatch: RoutedDispatch | None) -> ReductionPlan:
        axes = self.axes
        return ReductionPlan.of(
            num_ranks=1 if axes is None else axes.num_ranks,
            routed_ranks=None if axes is None or dispatch is None else axes.size(dispatch.layout.partial),
            reduce_results=self.config.parallel.reduce_results,
            has_shared_experts=self._separate_shared_experts is not None,
            has_output_transform=self.routed_output_transform is not None,
            has_zero_experts=self.config.router.num_zero_experts > 0,
        )

    def explain_dispatch(self, num_tokens: int) -> Choice:
        """Which dispatch strategy runs for `num_tokens` tokens (of all ranks together), why, and why no other.

        Raises:
            ValueError: the layer has no mesh, so nothing is dispatched.
            NotImplementedError: the strategy that was asked for, or every one, cannot run.
        """
        if self.axes is None:
            raise ValueError("only a layer on a mesh dispatches tokens; this one was built with mesh=None")
        return choose_strategy(self._dispatch_request(self.axes, num_tokens))[1]

    def expert_map_manager(self, ep_rank: int = 0) -> ExpertMapManager:
        """Which expert slots the ranks at position `ep_rank` of the expert axes hold."""
        return expert_map_manager(self.config, self.axes, ep_rank)

    @overload
    def __call__(
        self, hidden_states: Array, *, with_aux: Literal[False] = False, **inputs: Unpack[LayerInputs]
    ) -> Array: ...
    @overload
    def __call__(
        self, hidden_states: Array, *, with_aux: Literal[True], **inputs: Unpack[LayerInputs]
    ) -> tuple[Array, MoEAux]: ...
    @overload
    def __call__(
        self, hidden_states: Array, *, with_aux: bool, **inputs: Unpack[LayerInputs]
    ) -> Array | tuple[Array, MoEAux]: ...
    def __call__(
        self,
        hidden_states: Float[Array, "... D"],
        *,
        router_logits: Float[Array, "... E"] | None = None,
        input_ids: Int[Array, "..."] | None = None,
        shared_experts_input: Float[Array, "... S"] | None = None,
        forced_ids: Int[Array, "... K"] | None = None,
        token_mask: Bool[Array, "..."] | Int[Array, "..."] | None = None,
        key: Array | None = None,
        with_aux: bool = False,
    ) -> Float[Array, "... D"] | tuple[Float[Array, "... D"], MoEAux]:
        """Run the layer on any number of tokens, zero included.

        Args:
            hidden_states: tokens, with any leading dimensions, which the other arrays share.
            router_logits: logits of an external gate, in place of the router's own.
            input_ids: token ids, for routers that choose by them.
            shared_experts_input: what the shared experts see; `hidden_states` are then the routed path's input, already
                transformed.
            forced_ids: logical ids to route to, as `MoEAux.topk_ids` reports them.
            token_mask: tokens where it is 0 go to no expert, and whatever they hold, NaN too, reaches nothing: the aux has
                id -1 and weight 0 for them, and doesn't count them in its load. Shared experts see zeros in their place, so
                their output is meaningless, not zero.
            key: randomness, for simulated routing.
            with_aux: also return a `MoEAux`.

        Returns:
            The layer's output in the computation dtype, and the aux if asked for. `[ranks, ..., D]` partial results if
            `reduction_plan.result_is_partial`.

        Raises:
            ValueError: an argument that the router needs is missing, or dtypes, widths or leading dimensions don't fit.
        """
        arrays = (hidden_states, router_logits, input_ids, shared_experts_input, forced_ids, token_mask, key)
        if self.axes is None or not self.axes.has_explicit_axes:
            return self._forward(*arrays, with_aux=with_aux)

        # Routing and reshapes are written for arrays whose sharding the compiler chooses, so the layer runs as an
        # island with Auto axes, and its results take on the sharding of the hidden states. State that a transform
        # changes while it runs (a dropout counter) stays on the island.
        graph, state = nnx.split(self)

        def island(state, *arrays):
            return nnx.merge(graph, state)._forward(*arrays, with_aux=with_aux)

        leading = tuple(jax.typeof(hidden_states).sharding.spec)[:-1]
        is_partial = self.reduction_plan.result_is_partial
        out_sharding = result_shardings(self.axes, leading, is_partial=is_partial, with_aux=with_aux)
        run: Any = jax.sharding.auto_axes(island, axes=self.axes.mesh.axis_names, out_sharding=out_sharding)
        return run(state, *arrays)

    def _forward(
        self, hidden_states, router_logits, input_ids, shared_experts_input, forced_ids, token_mask, key, *, with_aux
    ) -> Array | tuple[Array, MoEAux]:
        # Parts may have been replaced.
        check_built_for(self.config, self.router, self.routed_experts, has_mesh=self.axes is not None)
        if router_logits is None and not self.is_internal_router:
            raise ValueError("the router has no weight of its own: router_logits must be given, got None")
        if shared_experts_input is not None and self.shared_experts is None:
            raise ValueError("shared_experts_input needs shared experts, and the layer has none")
        hidden_states = self._in_computation_dtype(hidden_states)
        check_hidden_states(hidden_states)
        order = TokenOrder.of(hidden_states.shape[:-1], self.axes)
        tokens = order.flatten("hidden_states", hidden_states, 1)
        router_logits = order.flatten("router_logits", router_logits, 1)
        is_routed = None
        if token_mask is not None:
            is_routed = order.flatten("token_mask", token_mask, 0)[:, None] != 0
            # What is left out may be NaN, and a gradient of zero times NaN is NaN.
            tokens = jnp.where(is_routed, tokens, 0)
            router_logits = None if router_logits is None else jnp.where(is_routed, router_logits, 0)
        dispatch = None if self.axes is None else self._dispatch(self.axes, tokens.shape[0])

        routed_input = tokens if dispatch is None else slice_tokens(dispatch, tokens)
        transform = None if shared_experts_input is not None else self.routed_input_transform
        num_tokens = routed_input.shape[0]
        if transform is not None:
            routed_input = _first(transform(routed_input)).astype(tokens.dtype)
        check_routed_input(transform, routed_input, num_tokens, self.config.hidden_size)
        if shared_experts_input is None:
            shared_input = tokens
        elif self.config.fuse_shared_experts:
            raise ValueError(
                "shared_experts_input needs fuse_shared_experts=False: fused, they see what routed experts see"
            )
        else:
            shared_input = self._in_computation_dtype(shared_experts_input)
            shared_input = order.flatten("shared_experts_input", shared_input, 1)
            shared_input = shared_input if is_routed is None else jnp.where(is_routed, shared_input, 0)

        topk_weights, topk_ids, logits = self.router(
            routed_input,
            router_logits=router_logits,
            input_ids=order.flatten("input_ids", input_ids, 0),
            forced_ids=order.flatten("forced_ids", forced_ids, 1),
            key=key,
        )
        if not isinstance(self.router, Router):
            name = f"the router {type(self.router).__name__}"
            topk_weights, topk_ids = checked_choice(name, topk_weights, topk_ids, num_tokens, self.config.top_k)
            logits = logits.astype(jnp.float32)
        if is_routed is not None:
            topk_weights, topk_ids = jnp.where(is_routed, topk_weights, 0), jnp.where(is_routed, topk_ids, -1)
        output, physical_ids, counts = self._run_experts(dispatch, routed_input, shared_input, topk_weights, topk_ids)
        output = order.unflatten(output)
        if not with_aux:
            return output
        aux = MoEAux(
            topk_ids=order.unflatten(topk_ids),
            topk_weights=order.unflatten(topk_weights),
            router_logits=order.unflatten(logits),
            expert_load=count_expert_load(topk_ids, self.config.num_experts),
            physical_load=count_expert_load(physical_ids, self.config.num_physical_experts),
            dropped_rows=counts.dropped_rows,
            sent_rows=counts.sent_rows,
        )
        return output, aux

    def _run_experts(
        self,
        dispatch: RoutedDispatch | None,
        routed_input: Float[Array, "T H"],
        shared_input: Float[Array, "T S"],
        topk_weights: Float[Array, "T K"],
        topk_ids: Int[Array, "T K"],
    ) -> tuple[Float[Array, "T D"] | Float[Array, "ranks T D"], Int[Array, "T K"], RoutedResult]:
        """Everything after routing: spec 1.4 steps 5 to 11. Also returns the physical ids, and what dispatch counted."""
        num_tokens = routed_input.shape[0]
        plan = self._reduction_plan(dispatch)
        routed_factor, shared_factor = self.scaling_plan.output_factors(routed_input.dtype)
        split = split_zero_experts(topk_weights, topk_ids, num_experts=self.config.num_experts)
        has_unknown_id = jnp.any(topk_ids >= self.config.num_experts + self.config.router.num_zero_experts, axis=-1)
        physical_ids = split.topk_ids if self.replicas is None else self.replicas(split.topk_ids)

        result = self._run_routed(dispatch, routed_input, split.topk_weights, physical_ids)
        routed = result.partials
        if dispatch is None or dispatch.axes.size(dispatch.layout.partial) == 1:
            routed = routed[0, :num_tokens]
        elif plan.routed_before_transform:
            routed = sum_over_ranks(dispatch.axes, routed, dispatch.layout, dispatch.layout, num_tokens)
        output = routed if routed_factor == 1.0 else routed * routed_factor
        if self.routed_output_transform is not None:
            output = _first(self.routed_output_transform(output))
        output = output.astype(routed_input.dtype)

        if self._separate_shared_experts is not None:
            shared = self._run_shared(dispatch, shared_input, summed=plan.shared_alone).astype(output.dtype)
            check_same_tokens(output, shared)
            output = output + (shared if shared_factor == 1.0 else shared * shared_factor)

        if dispatch is not None:
            if plan.final:
                output = sum_over_ranks(dispatch.axes, output, dispatch.layout, dispatch.layout, num_tokens)
            if plan.result_is_partial:
                output = output[:, :num_tokens]
            else:
                output = gather_slices(dispatch, output)
        if self.config.router.num_zero_experts:
            if output.shape[-1] != routed_input.shape[-1]:
                raise ValueError(
                    f"zero experts return the routed input, so its width must be that of the layer's output "
                    f"({output.shape[-1]}), got {routed_input.shape[-1]}"
                )
            output = output + split.identity_weight[:, None].astype(output.dtype) * routed_input
        # Under `jit` nothing can be raised, and an id that is no expert's must not pass for a token without one.
        return jnp.where(has_unknown_id[:, None], jnp.nan, output), physical_ids, result

    def _dispatch_request(self, axes: LayerAxes, num_tokens: int) -> DispatchRequest:
        return DispatchRequest(axes=axes, config=self.config, num_tokens=num_tokens)

    def _dispatch(self, axes: LayerAxes, num_tokens: int) -> RoutedDispatch:
        """How `num_tokens` tokens meet their experts."""
        request = self._dispatch_request(axes, num_tokens)
        strategy, _ = choose_strategy(request)
        if count := self.config.num_fused_shared_experts:
            strategy = WithFusedSharedExperts(strategy, count, self.scaling_plan.fused_shared_weight)
        settings = dataclasses.replace(request.settings, weights_on_input=self.config.apply_router_weight_on_input)
        return RoutedDispatch(strategy, settings, self.config.parallel.micro_batches)

    def _run_routed(
        self, dispatch: RoutedDispatch | None, x: Array, topk_weights: Array, physical_ids: Array
    ) -> RoutedResult:
        """The routed experts, and shared ones that are fused with them, on one device or on all ranks."""
        experts, count = self.routed_experts, self.config.num_fused_shared_experts
        shared = None
        if count:
            check_fused_shared_experts(self)  # parts may have been replaced
            shared = self.shared_experts.as_expert()
        if dispatch is not None:
            compute, weights = experts.computation, experts.weights()
            return routed_partials(dispatch, compute, x, topk_weights, physical_ids, weights, shared)
        if shared is None:
            output = experts(x, topk_weights, physical_ids)
        else:
            first_id, weight = self.config.num_physical_experts, self.scaling_plan.fused_shared_weight
            topk_weights, ids = append_fused_shared_experts(
                topk_weights, physical_ids, first_id=first_id, count=count, weight=weight
            )
            output = experts.computation(x, topk_weights, ids, experts.weights().followed_by(shared))
        none = jnp.zeros((), jnp.int32)
        return RoutedResult(output[None], sent_rows=none[None], dropped_rows=none)

    def _run_shared(self, dispatch: RoutedDispatch | None, x: Array, *, summed: bool) -> Array:
        """`[T, D]`, or `[ranks, Tpadded, D]` partial results that are still to be summed."""
        check_can_be_split(self.shared_experts, 1 if dispatch is None else dispatch.axes.num_ranks)  # if replaced
        if dispatch is None or not isinstance(self.shared_experts, SharedExperts):
            return self.shared_experts(x)
        partials = shared_partials(dispatch, self.shared_experts, x)
        if summed:
            layout = TokenLayout.of(dispatch.axes, sliced=False)
            return sum_over_ranks(dispatch.axes, partials, layout, dispatch.layout, x.shape[0])
        return partials if dispatch.axes.num_ranks > 1 else partials[0, : x.shape[0]]

    def partition_specs(self) -> nnx.State:
        """How each parameter is split over the mesh: a state of `PartitionSpec`s."""
        return nnx.map_state(lambda path, _: partition_spec(self, path), nnx.state(self))

    def check_parts(self) -> None:
        """Raise ValueError unless the plans can be kept with the parts that are there."""
        if self.config.fuse_shared_experts:
            check_fused_shared_experts(self)
        if self.axes is None:
            return
        self.axes.validate(self.config)
        check_can_be_split(self.shared_experts, self.axes.num_ranks)
        choose_strategy(self._dispatch_request(self.axes, num_tokens=1))

    def _in_computation_dtype(self, array: Array) -> Array:
        return jnp.asarray(array, self.config.dtype)

    def __nnx_repr__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield from super().__nnx_repr__()
        yield reprlib.Attr("scaling_plan", self.scaling_plan)
        yield reprlib.Attr("reduction_plan", self.reduction_plan)
        if self.axes is not None:
            yield reprlib.Attr("dispatch_strategy", self.config.parallel.strategy or "chosen by number of tokens")


_REPLACEABLE = ("shared_experts", "routed_input_transform", "routed_output_transform")
"""Parts that may be a module, a function or None, one after the other."""


def _as_part(part: Any) -> Any:
    """`part` marked as what it is now: a module or None has state, or might; a function has none."""
    if isinstance(part, dataclasses.Field):  # what `nnx.data` and `nnx.static` return: the caller has marked it
        return part
    return nnx.data(part) if part is None or isinstance(part, nnx.Module) else nnx.static(part)


def _first(result: Any) -> Array:
    """The output of a transform that may return `(output, extra)`."""
    return result[0] if isinstance(result, tuple) else result
