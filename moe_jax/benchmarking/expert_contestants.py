"""Ways to compute the experts of an MoE block on one device: ours, and what a user of JAX would pick instead.

All take the same arguments, so that they can be checked and timed side by side: tokens, router weights, ids and a dict of
weights. What others want laid out differently is converted once, outside of what is timed.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.kernels import explain_fused_moe, fused_moe

Weights = Mapping[str, Array | None]
Block = Callable[[Array, Array, Array, Weights], Array]
RaggedDot = Callable[[Array, Array, Array], Array]

OURS = ("pallas_gpu", "xla")
"""Implementations of `fused_moe` that are measured, where they exist and support the arguments."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to compute the experts."""

    name: str
    block: Block
    """(x [T, H], topk_weights [T, K], topk_ids [T, K], weights) -> [T, H]."""
    prepare: Callable[[Weights], Weights]
    """Lays the weights of `fused_moe` out as `block` wants them."""
    is_ours: bool = False
    multiplies_all_pairs: bool = False
    """Multiplies every row by the matrix of every expert (and masks): too slow to be timed where there are many."""


def contestants(shape: ExpertShape, tokens: int) -> tuple[list[Contestant], dict[str, str]]:
    """Who can compute this shape on the device at hand, ours first, and who can't, with the reason."""
    able, unable = [], {}
    for implementation in OURS:
        reason = why_not(shape, tokens, implementation)
        if reason is None:
            able.append(ours(shape, implementation))
        else:
            unable[f"moe_jax {implementation}"] = reason
    able.append(
        Contestant(
            "jax.lax.ragged_dot",
            functools.partial(sorted_block, shape=shape, ragged_dot=jax.lax.ragged_dot),
            in_first,
            multiplies_all_pairs=True,
        )
    )
    ragged_dot = tokamax_ragged_dot()
    if isinstance(ragged_dot, str):
        unable["tokamax.ragged_dot"] = ragged_dot
    else:
        block = functools.partial(sorted_block, shape=shape, ragged_dot=ragged_dot)
        able.append(Contestant("tokamax.ragged_dot", block, in_first))
    return able, unable


@functools.cache
def tokamax_ragged_dot() -> RaggedDot | str:
    """Somebody else's, measured where it is installed; or why it can't be had."""
    try:
        if importlib.util.find_spec("tokamax") is None:
            return "tokamax is not installed"
        return importlib.import_module("tokamax").ragged_dot
    except Exception as error:  # noqa: BLE001 - whatever a broken or half installed library raises
        return f"tokamax cannot be used: {type(error).__name__}: {error}"


def why_not(shape: ExpertShape, tokens: int, implementation: str) -> str | None:
    """Why `fused_moe` can't compute this shape with an implementation; None if it can."""
    arguments = shape.fused_moe_arguments(tokens)
    try:
        explain_fused_moe(
            **arguments,  # pyright: ignore[reportArgumentType]
            activation=shape.activation,
            expected_rows=shape.expected_rows(tokens),
            implementation=implementation,
        )
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def ours(shape: ExpertShape, implementation: str) -> Contestant:
    """`fused_moe` with a named implementation."""

    def block(x: Array, topk_weights: Array, topk_ids: Array, weights: Weights) -> Array:
        return fused_moe(
            x,
            topk_weights,
            topk_ids,
            activation=shape.activation,
            expected_rows=shape.expected_rows(x.shape[0]),
            implementation=implementation,
            **weights,  # pyright: ignore[reportArgumentType]
        )

    return Contestant(f"moe_jax {implementation}", block, as_given, is_ours=True)


def as_given(weights: Weights) -> Weights:
    """As `fused_moe` takes them."""
    return weights


def in_first(weights: Weights) -> Weights:
    """Matrices as [E, in, out], gate and up side by side, as `ragged_dot` takes them."""
    gate_up, gate_up_bias = weights["gate_up_proj"], weights["gate_up_bias"]
    assert gate_up is not None
    return {
        **weights,
        "gate_up_proj": _transposed(gate_up),
        "down_proj": _transposed(weights["down_proj"]),
        "gate_up_bias": None if gate_up_bias is None else gate_up_bias.reshape(gate_up_bias.shape[0], -1),
    }


@jax.jit
def _transposed(matrices: Array) -> Array:
    """[E, ..., in] as [E, in, ...], flattened to three axes."""
    return jnp.swapaxes(matrices.reshape(matrices.shape[0], -1, matrices.shape[-1]), 1, 2)


def sorted_block(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T K"],
    topk_ids: Int[Array, "T K"],
    weights: Weights,
    *,
    shape: ExpertShape,
    ragged_dot: RaggedDot,
) -> Float[Array, "T H"]:
    """The experts around any `ragged_dot(rows, matrices, group_sizes)`: sort, gather, multiply, activate, multiply, combine."""
    (T, K), E = topk_ids.shape, shape.local_experts
    expert = jnp.where(topk_ids < E, topk_ids, E).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    group_sizes = jnp.bincount(expert, length=E + 1)[:E].astype(jnp.int32)
    group = jnp.minimum(expert[order], E - 1)

    def project(rows: Array, name: str) -> Array:
        result = ragged_dot(rows, weights[f"{name}_proj"], group_sizes)  # pyright: ignore[reportArgumentType]
        bias = weights[f"{name}_bias"]
        return result if bias is None else result + bias[group]

    projected = project(x[order // K], "gate_up")
    projections = 2 if shape.activation.is_gated else 1
    results = project(shape.activation(*jnp.split(projected, projections, axis=1)).astype(x.dtype), "down")
    by_pair = jnp.zeros_like(order).at[order].set(jnp.arange(T * K))
    chosen = results[by_pair].reshape(T, K, -1)
    weighted = topk_weights[:, :, None] * chosen.astype(jnp.float32)
    return jnp.sum(jnp.where((topk_ids < E)[:, :, None], weighted, 0), axis=1).astype(x.dtype)
