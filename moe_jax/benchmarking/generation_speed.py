"""How fast a model reads prompts and writes tokens."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.generation import GenerationSettings, Timing, generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSpeed:
    """Rounds of one measurement; compiling is not part of them."""

    batch_size: int
    prompt_tokens: int
    """Tokens of each prompt."""
    new_tokens: int
    """Tokens generated for each prompt."""
    compile_seconds: float
    rounds: Sequence[Timing]

    @property
    def prefill_tokens_per_second(self) -> float:
        """Median over the rounds."""
        return statistics.median(timing.prefill_tokens_per_second for timing in self.rounds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Median over the rounds, all rows together."""
        return statistics.median(timing.decode_tokens_per_second for timing in self.rounds)


def measure_generation(
    model: Any, *, batch_size: int = 1, prompt_tokens: int = 128, new_tokens: int = 64, rounds: int = 5, seed: int = 0
) -> GenerationSpeed:
    """Generate greedily from random prompts, once to compile and then `rounds` times.

    Raises:
        ValueError: `rounds` is not positive, or see `moe_jax.generation.generate`.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    prompts = np.random.default_rng(seed).integers(0, model.decoder.vocab_size, (batch_size, prompt_tokens))
    settings = GenerationSettings(max_new_tokens=new_tokens)
    first = generate(model, prompts, settings)
    return GenerationSpeed(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        compile_seconds=first.timing.compile_seconds,
        rounds=tuple(generate(model, prompts, settings).timing for _ in range(rounds)),
    )
