"""Routed experts: the weights of a layer's experts and the computation of those that each token chose."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import MoEConfig
from moe_jax.experts.replicas import initial_physical_to_logical
from moe_jax.experts.weights import ExpertWeights
from moe_jax.kernels import Activation, expert_parallel_moe, fused_moe

if TYPE_CHECKING:
    from moe_jax.placement import ExpertMapManager


def default_expert_init(
    key: Key[Array, ""], shape: Sequence[Any], dtype: Any = None, out_sharding: Any = None
) -> Array:
    """LeCun normal for each (out, in) matrix: experts, and gate and up, are matrices of their own."""
    matrices = tuple(range(len(shape) - 2))
    draw = initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2, batch_axis=matrices
    )
    return draw(key, shape, dtype, out_sharding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertComputation:
    """How experts compute, without their weights: hashable, so that it can be a static argument under `jax.jit`."""

    activation: Activation
    """Function between the projections."""
    apply_router_weight_on_input: bool
    """Multiply the expert's input by the router weight instead of its output."""
    implementation: str | None
    """Implementation of `fused_moe`; None chooses by device and shape."""

    @classmethod
    def of(cls, config: MoEConfig) -> Self:
        """The computation that a layer's config describes."""
        return cls(
            activation=Activation.of(config.activation),
            apply_router_weight_on_input=config.apply_router_weight_on_input,
            implementation=config.implementation,
        )

    @functools.partial(jax.jit, static_argnums=0, static_argnames="expected_rows")
    def __call__(
        self,
        x: Float[Array, "T H"],
        topk_weights: Float[Array, "T K"],
        topk_ids: Int[Array, "T K"],
        weights: ExpertWeights,
        expert_offset: Int[Array, ""] | None = None,
        *,
        expected_rows: int | None = None,
    ) -> Float[Array, "T H"]:
        """Run `weights`, those of the experts from `expert_offset` (None: 0) on; other ids contribute nothing.

        `expected_rows` is about how many choices name one of these experts (None: all), see `fused_moe`.

        Computes in the dtype of `x`, to which the weights are converted; float32 weights get float32 gradients, which were
        never rounded to that of `x`. Jitted, because outside of `jax.jit` the
        loops of an implementation would run operation by operation.
        """
        weights = _as_taken(weights, x)
        return fused_moe(
            x,
            topk_weights,
            topk_ids,
            weights.gate_up_proj,
            weights.down_proj,
            gate_up_bias=weights.gate_up_bias,
            down_bias=weights.down_bias,
            activation=self.activation,
            expert_offset=0 if expert_offset is None else expert_offset,
            layer=weights.layer,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            expected_rows=expected_rows,
            implementation=self.implementation,
        )

    def over_ranks(
        self,
        x: Float[Array, "T H"],
        topk_weights: Float[Array, "T K"],
        topk_ids: Int[Array, "T K"],
        weights: ExpertWeights,
        *,
        axis: str | tuple[str, ...],
    ) -> Float[Array, "T H"]:
        """Run the experts of all ranks along `axis`, whose `weights` each rank has, on this rank's tokens, by one TPU kernel.

        For use inside `jax.shard_map`; see `expert_parallel_moe`. Ids are those of all ranks' experts.
        """
        weights = _as_taken(weights, x)
        return expert_parallel_moe(
            x,
            topk_weights,
            topk_ids,
            weights.gate_up_proj,
            weights.down_proj,
            axis=axis,
            gate_up_bias=weights.gate_up_bias,
            down_bias=weights.down_bias,
            activation=self.activation,
            layer=weights.layer,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            implementation="pallas_tpu",
        )


def _as_taken(weights: ExpertWeights, x: Array) -> ExpertWeights:
    """Weights in a dtype that kernels take beside `x`: its own, or float32."""
    is_taken = [matrices.dtype in (x.dtype, jnp.float32) for matrices in (weights.gate_up_proj, weights.down_proj)]
    return weights if all(is_taken) else weights.as_dtype(x.dtype)


class RoutedExperts(nnx.Module):
    """The experts of one layer; a token passes those that its router chose, weighted.

    The module owns weights and expert map, nothing else: routing, shared experts and reductions belong to the runner,
    and shared experts are never stored here (spec 0.2).

    Attributes:
        gate_up_proj: `[E, 2, I, H]` (`[E, 1, I, H]` without a gate), E the physical experts held here.
        down_proj: `[E, H, I]`.
        gate_up_bias: `[E, 2, I]` if `config.expert_bias`, else None.
        down_bias: `[E, H]` if `config.expert_bias`, else None.
        expert_map_manager: the placement of one rank, or None when all experts are held here.
        layer: None; inside a scan over layers, which of these it is, if the projections are those of all of them.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        expert_map_manager: Optional["ExpertMapManager"] = None,
        placement: Int[np.ndarray, "P"] | None = None,
        kernel_init: initializers.Initializer = default_expert_init,
        rngs: nnx.Rngs,
    ):
        """Create the weights in `config.param_dtype`; biases start at zero.

        With the same `rngs`, a logical expert starts with the same weights in each of its copies, whichever rank holds them.

        Args:
            config: sizes, activation, biases, number formats and implementation.
            expert_map_manager: holds only this rank's experts and skips the ids of all others: the sum of the ranks'
                results is the layer's. Replace the attribute after `update` only together with the weights.
            placement: the logical expert in each physical slot of the layer; None: as `initial_physical_to_logical` says.
            kernel_init: initializer of both projections, called for one expert's at a time.
            rngs: source of the `params` keys.

        Raises:
            ValueError: a manager for another number of experts, with tensor parallelism, or with fused shared experts.
        """
        if expert_map_manager is not None:
            _check_manager(expert_map_manager, config)
        self.computation = ExpertComputation.of(config)
        self.expert_map_manager = expert_map_manager
        experts = config.num_physical_experts if expert_map_manager is None else expert_map_manager.local_num_experts
        hidden, intermediate, halves = (
            config.hidden_size,
            config.intermediate_size,
            2 if self.computation.activation.is_gated else 1,
        )

        def zeros(*shape: int) -> nnx.Param | None:
            return (
                nnx.Param(initializers.zeros(rngs.params(), shape, config.param_dtype)) if config.expert_bias else None
            )

        slots = np.arange(config.num_physical_experts)
        if expert_map_manager is not None:
            slots = expert_map_manager.get_local_expert_ids()
        if placement is None:
            placement = initial_physical_to_logical(config.num_experts, config.num_redundant_experts)

        def projection(*shape: int) -> nnx.Param:
            # Each logical expert has a key of its own, so that it starts alike wherever it is held, and in every copy.
            key = rngs.params()
            keys = jax.vmap(lambda expert: jax.random.fold_in(key, expert))(jnp.asarray(placement[slots]))
            return nnx.Param(jax.vmap(lambda key: kernel_init(key, shape, config.param_dtype))(keys))

        self.gate_up_proj = projection(halves, intermediate, hidden)
        self.down_proj = projection(hidden, intermediate)
        self.gate_up_bias = nnx.data(zeros(experts, halves, intermediate))
        self.down_bias = nnx.data(zeros(experts, hidden))
        self.layer: Int[Array, ""] | None = nnx.data(None)

    @property
    def num_local_experts(self) -> int:
        """Experts whose weights are held here."""
        return self.gate_up_proj.shape[-4]

    def weights(self) -> ExpertWeights:
        """The parameters as arrays."""
        return ExpertWeights(
            self.gate_up_proj[...],
            self.down_proj[...],
            None if self.gate_up_bias is None else self.gate_up_bias[...],
            None if self.down_bias is None else self.down_bias[...],
            self.layer,
        )

    def __call__(
        self, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
    ) -> Float[Array, "T H"]:
        """The weighted sum of the chosen experts' outputs, in the dtype of `x`.

        Args:
            x: tokens; zero of them are legal.
            topk_weights: float32 router weights.
            topk_ids: physical expert ids; -1, and ids of experts that are not held here, contribute nothing.
        """
        placement = self.expert_map_manager
        if placement is None:
            return self.computation(x, topk_weights, topk_ids, self.weights())
        if not placement.local_num_experts:
            return jnp.zeros_like(x)  # more ranks than experts: this one adds nothing to the sum
        local_share = placement.local_num_experts / placement.global_num_experts
        return self.computation(
            x,
            topk_weights,
            _map_to_local(topk_ids, placement.expert_map),
            self.weights(),
            expected_rows=math.ceil(topk_ids.size * local_share),
        )


def _check_manager(manager: "ExpertMapManager", config: MoEConfig) -> None:
    """Raise ValueError unless `RoutedExperts` can hold what the manager gives its rank."""
    if manager.global_num_experts != config.num_physical_experts:
        raise ValueError(
            f"expert_map_manager must place the config's {config.num_physical_experts} physical experts, "
            f"got one for {manager.global_num_experts}"
        )
    if manager.ranks.tp_size > 1:
        raise ValueError(
            f"expert_map_manager must have tp_size=1, got {manager.ranks.tp_size}: slices of experts are held on a mesh only"
        )
    if manager.num_fused_shared_experts:
        raise ValueError(
            f"expert_map_manager must have num_fused_shared_experts=0, got {manager.num_fused_shared_experts}: "
            "shared experts are held by the layer"
        )


def _map_to_local(topk_ids: Int[Array, "T K"], expert_map: np.ndarray | None) -> Int[Array, "T K"]:
    """Local indices of global ids; -1 for experts that live elsewhere, and for ids that name none."""
    if expert_map is None:
        return topk_ids
    is_expert = (topk_ids >= 0) & (topk_ids < len(expert_map))
    return jnp.where(is_expert, jnp.asarray(expert_map)[jnp.where(is_expert, topk_ids, 0)], -1)
