"""Routing simulation: routing made up from a known distribution, to measure experts without a trained router."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

SimulationStrategy = Callable[[Key[Array, ""], int, int, int], tuple[Float[Array, "T K"], Int[Array, "T K"]]]
"""`strategy(key, num_tokens, num_experts, top_k) -> (topk_weights [T, K], topk_ids [T, K])`."""


def uniform_random(
    key: Key[Array, ""], num_tokens: int, num_experts: int, top_k: int
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Every id equally likely, drawn with replacement; all weights 1 (spec 2.9)."""
    ids = jax.random.randint(key, (num_tokens, top_k), 0, num_experts, dtype=jnp.int32)
    return jnp.ones((num_tokens, top_k), jnp.float32), ids


def normal_routing(
    key: Key[Array, ""], num_tokens: int, num_experts: int, top_k: int
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Ids `floor(sigmoid(N(0, 1)) * E)`, so that middle experts are hot; weights `|N(0, 1)|`, summing to 1.

    Source: spec 2.9.
    """
    id_key, weight_key = jax.random.split(key)
    position = jax.nn.sigmoid(jax.random.normal(id_key, (num_tokens, top_k)))
    ids = jnp.floor(position * num_experts).astype(jnp.int32)
    weights = jnp.abs(jax.random.normal(weight_key, (num_tokens, top_k)))
    return weights / weights.sum(axis=-1, keepdims=True), ids


_strategies: dict[str, SimulationStrategy] = {"uniform_random": uniform_random, "normal_routing": normal_routing}


def register_strategy(name: str, strategy: SimulationStrategy) -> None:
    """Make `strategy` available as `RouterConfig(simulation=name)`.

    Raises:
      ValueError: `name` is taken.
    """
    if name in _strategies:
        raise ValueError(f"routing simulation {name!r} is already registered; registered: {registered_names()}")
    _strategies[name] = strategy


def find_strategy(name: str) -> SimulationStrategy:
    """The strategy registered under `name`.

    Raises:
      ValueError: there is none.
    """
    if name not in _strategies:
        raise ValueError(f"simulation must be one of {registered_names()}; got {name!r}")
    return _strategies[name]


def registered_names() -> str:
    """Names of all registered strategies, for people to read."""
    return ", ".join(sorted(_strategies))
