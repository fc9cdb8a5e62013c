"""The experts of a layer: routed ones, of which each token passes a few, and shared ones, which every token passes."""

from moe_jax.experts.routed import RoutedExperts
from moe_jax.experts.shared import SharedExperts
from moe_jax.experts.weights import EXPERT_PARAMETERS, ExpertWeights

__all__ = ["EXPERT_PARAMETERS", "ExpertWeights", "RoutedExperts", "SharedExperts"]
