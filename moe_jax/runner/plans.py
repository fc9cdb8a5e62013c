"""Who scales and who reduces: two decisions taken once, when a layer is put together, and shown by its `repr`.

Scaling applied twice or not at all, and shared experts reduced twice, are the bugs that upstream met again and again
(spec 11.7, 11.8). Each decision is therefore made in one place, and the rest of the layer only carries it out.
"""

import dataclasses
from typing import Any, Literal, Self

import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.routing import fused_shared_expert_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingPlan:
    """Where `routed_scaling_factor` is applied: exactly one place (spec 1.3, 1.6)."""

    factor: float
    """The model's factor on the routed output."""
    applied_to: Literal["router weights", "routed output"]
    """The router multiplies its weights, or the runner multiplies the routed experts' output."""
    inverse_on_shared_in_float16: bool
    """In float16 the routed output stays as it is and the shared output is divided by the factor instead."""

    @classmethod
    def of(cls, config: MoEConfig, *, has_shared_experts: bool) -> Self:
        """The plan of a layer; its config has refused combinations in which some output misses the factor."""
        router = config.router
        return cls(
            factor=float(router.routed_scaling_factor),
            applied_to="routed output" if router.apply_scale_to_output else "router weights",
            inverse_on_shared_in_float16=config.inverse_scale_shared_in_float16 and has_shared_experts,
        )

    @property
    def fused_shared_weight(self) -> float:
        """Router weight of shared experts that are fused with the routed ones, and so scaled as these."""
        return fused_shared_expert_weight(self.factor, apply_scale_to_output=self.applied_to == "routed output")

    def output_factors(self, dtype: Any) -> tuple[float, float]:
        """What the runner multiplies the routed and the shared output by, when computing in `dtype`."""
        if self.applied_to == "router weights":
            return 1.0, 1.0
        if self.inverse_on_shared_in_float16 and jnp.dtype(dtype) == jnp.float16:
            return 1.0, 1.0 / self.factor
        return self.factor, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReductionPlan:
    """Which sums over the layer's ranks happen, and when (spec 1.4 steps 5, 6 and 10).

    Each rank's experts give a partial result of the routed output, and its slice of the shared experts one of the
    shared output. At most one of "each alone" and "their sum" is reduced, so nothing is summed twice.
    """

    num_ranks: int
    """Ranks that hold partial results of the same tokens; 1 means that nothing is ever summed."""
    routed_before_transform: bool
    """Sum the routed output alone, before the output transform, which may be non-linear."""
    shared_alone: bool
    """Sum the shared output alone, because the routed one has been summed already."""
    final: bool
    """Sum the layer's result, routed plus shared, once."""
    routed_comes_summed: bool = False
    """The routed output comes back from its experts as a sum already, so only the shared one is ever summed."""

    @classmethod
    def of(
        cls,
        *,
        num_ranks: int,
        routed_ranks: int | None = None,
        reduce_results: bool,
        has_shared_experts: bool,
        has_output_transform: bool,
        has_zero_experts: bool,
    ) -> Self:
        """The plan of a layer.

        Args:
            num_ranks: positions along the expert and tensor axes whose ranks hold the same tokens.
            routed_ranks: ranks over which the routed output is partial, if it comes back from its experts summed over the others;
                None: `num_ranks`.
            reduce_results: False asks for partial results. Zero experts, whose part every rank holds whole, an output transform,
                which needs the whole routed output, and a routed output that comes back summed reduce nevertheless, as upstream
                does.
            has_shared_experts: the layer has shared experts.
            has_output_transform: the layer has a `routed_output_transform`.
            has_zero_experts: the router has zero experts.
        """
        routed_ranks = num_ranks if routed_ranks is None else routed_ranks
        parallel = num_ranks > 1
        one_by_one = parallel and (has_output_transform or routed_ranks != num_ranks)
        return cls(
            num_ranks=num_ranks,
            routed_before_transform=one_by_one and routed_ranks > 1,
            shared_alone=one_by_one and has_shared_experts,
            final=parallel and not one_by_one and (reduce_results or has_zero_experts),
            routed_comes_summed=parallel and routed_ranks == 1,
        )

    @property
    def result_is_partial(self) -> bool:
        """Whether the layer returns `[ranks, ..., H]` for its caller to sum, instead of `[..., H]`."""
        return self.num_ranks > 1 and not (self.routed_before_transform or self.routed_comes_summed or self.final)
