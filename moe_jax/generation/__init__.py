"""Text generation: sampling, the settings of a checkpoint, and the compiled loop."""

from moe_jax.generation.sampling import greedy, in_nucleus, penalize_repetition, sample
from moe_jax.generation.settings import GenerationSettings, read_generation_settings, settings_from_hf
from moe_jax.generation.text_generation import FinishReason, Generation, Timing, generate, generate_batches

__all__ = [
    "FinishReason",
    "Generation",
    "GenerationSettings",
    "Timing",
    "generate",
    "generate_batches",
    "greedy",
    "in_nucleus",
    "penalize_repetition",
    "read_generation_settings",
    "sample",
    "settings_from_hf",
]
