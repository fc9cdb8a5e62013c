"""The Mixture-of-Experts layer: router, experts, shared experts and transforms, put together and run in order."""

from moe_jax.runner.aux import MoEAux
from moe_jax.runner.discovery import is_moe_layer
from moe_jax.runner.interface import MoERunnerInterface
from moe_jax.runner.plans import ReductionPlan, ScalingPlan
from moe_jax.runner.runner import MoERunner

__all__ = ["MoEAux", "MoERunner", "MoERunnerInterface", "ReductionPlan", "ScalingPlan", "is_moe_layer"]
