"""The float32 computations that checks compare with.

They go expert by expert over a sample of the tokens, or over one expert, so that they fit beside the largest shapes. A suite
compiles them beforehand, beside what it checks: the compiler tries many ways to multiply in float32, which takes long.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe_jax.benchmarking.expert_contestants import Weights
from moe_jax.benchmarking.expert_shapes import ExpertShape

References = Mapping[str, Callable[..., Any]]
"""By name; see `reference_functions`."""

SAMPLED_TOKENS = 128
"""What is computed for a sample of the tokens is computed for so many."""


def float32_block(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    weights: Weights,
    *,
    shape: ExpertShape,
) -> Float[Array, "T H"]:
    """The definition in float32, one expert after the other; for few tokens."""
    given = {name: array for name, array in weights.items() if array is not None}
    x = x.astype(jnp.float32)

    @jax.checkpoint  # or a backward pass would keep every expert's matrices in float32
    def add_expert(total: Array, numbered: tuple[Array, dict[str, Array]]) -> tuple[Array, None]:
        expert, own = numbered
        own = {name: array.astype(jnp.float32) for name, array in own.items()}
        projected = [jnp.dot(x, matrix.T, precision="highest") for matrix in own["gate_up_proj"]]
        if "gate_up_bias" in own:
            projected = [product + bias for product, bias in zip(projected, own["gate_up_bias"], strict=True)]
        output = jnp.dot(shape.activation(*projected), own["down_proj"].T, precision="highest")
        if "down_bias" in own:
            output += own["down_bias"]
        weight = jnp.sum(jnp.where(topk_ids == expert, topk_weights, 0), axis=1)
        return total + jnp.where(weight[:, None] != 0, weight[:, None] * output, 0), None

    experts = jnp.arange(given["down_proj"].shape[0])
    return jax.lax.scan(add_expert, jnp.zeros_like(x), (experts, given))[0]


def _gradients_of_tokens(x, topk_weights, ids, weights, cotangent, *, shape) -> tuple[Array, Array]:
    _, pullback = jax.vjp(
        lambda x, w: float32_block(x, w, ids, weights, shape=shape), x.astype(jnp.float32), topk_weights
    )
    return pullback(cotangent.astype(jnp.float32))


def _gradients_of_weights(x, topk_weights, ids, weights, cotangent, *, shape) -> dict[str, Array]:
    wide = {name: array.astype(jnp.float32) for name, array in weights.items()}
    _, pullback = jax.vjp(lambda wide: float32_block(x, topk_weights, ids, wide, shape=shape), wide)
    return pullback(cotangent.astype(jnp.float32))[0]


def reference_functions(shape: ExpertShape) -> References:
    """By name: functions of x, topk_weights, topk_ids and weights, and of a cotangent too if they are gradients.

    "block" is the whole computation, "tokens_gradient" its gradient in tokens and router weights, "weights_gradient" that in the
    weights of the experts it is given.
    """
    functions = {
        "block": float32_block,
        "tokens_gradient": _gradients_of_tokens,
        "weights_gradient": _gradients_of_weights,
    }
    return {name: functools.partial(function, shape=shape) for name, function in functions.items()}


@functools.cache
def jitted_references(shape: ExpertShape) -> References:
    """For checks that come alone: compiled when they are called."""
    return {name: jax.jit(function) for name, function in reference_functions(shape).items()}


def reference_programs(
    kind: Literal["forward", "backward"], shape: ExpertShape, tokens: int, dtype: Any = jnp.bfloat16
) -> dict[tuple[str, int], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What the check of a pass over so many tokens calls, and with which arguments, by name and number of tokens."""
    functions = reference_functions(shape)
    sampled, every = (_described(shape, number, dtype) for number in (SAMPLED_TOKENS, tokens))
    if kind == "forward":
        return {("block", SAMPLED_TOKENS): (functions["block"], sampled)}
    one_expert = {
        name: jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)
        for name, array in every[3].items()
        if array is not None
    }
    return {
        ("tokens_gradient", SAMPLED_TOKENS): (functions["tokens_gradient"], (*sampled, sampled[0])),
        ("weights_gradient", tokens): (functions["weights_gradient"], (*every[:3], one_expert, every[0])),
    }


def _described(shape: ExpertShape, tokens: int, dtype: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Shapes of tokens, router weights, ids and weights."""
    given = shape.fused_moe_arguments(tokens, dtype)
    x, topk_weights, topk_ids = (given.pop(name) for name in ("x", "topk_weights", "topk_ids"))
    return x, topk_weights, topk_ids, given
