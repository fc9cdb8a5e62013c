"""How fast one MoE layer computes, by number of tokens."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.benchmarking.expert_work import matrices_per_expert
from moe_jax.config import MoEConfig
from moe_jax.kernels.activations import Activation
from moe_jax.runner import MoERunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEBlockSpeed:
    """Rounds of one measurement; compiling is not part of them."""

    tokens: int
    compile_seconds: float
    seconds: Sequence[float]
    """Of each round."""
    flops: int
    """Floating-point operations of the expert matmuls: 2 per multiply-add, of the chosen experts only."""

    @property
    def median_seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def gflops_per_second(self) -> float:
        """1e9 operations of the expert matmuls per second, in the median round."""
        return self.flops / self.median_seconds / 1e9


def measure_moe_block(config: MoEConfig, *, tokens: int, rounds: int = 10, seed: int = 0) -> MoEBlockSpeed:
    """Run a layer with random weights on random tokens, once to compile and warm up and then `rounds` times.

    Raises:
        ValueError: `tokens` or `rounds` is not positive.
    """
    if tokens < 1 or rounds < 1:
        raise ValueError(f"tokens and rounds must be at least 1, got {tokens} and {rounds}")
    graph, state = nnx.split(MoERunner(config, rngs=nnx.Rngs(seed)))
    numbers = np.random.default_rng(seed).standard_normal((tokens, config.hidden_size), np.float32)
    x = jnp.asarray(numbers, config.param_dtype)

    def forward(state: Any, x: jax.Array) -> Any:
        return nnx.merge(graph, state)(x)

    started = time.perf_counter()
    compiled = jax.jit(forward).lower(state, x).compile()
    compile_seconds = time.perf_counter() - started
    compiled(state, x).block_until_ready()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        compiled(state, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    matrices = matrices_per_expert(Activation.of(config.activation))
    return MoEBlockSpeed(
        tokens=tokens,
        compile_seconds=compile_seconds,
        seconds=tuple(seconds),
        flops=2 * matrices * tokens * config.top_k * config.hidden_size * config.intermediate_size,
    )
