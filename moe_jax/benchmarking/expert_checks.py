"""Whether a way to compute the experts is right: against float32, on fresh random numbers, with traps laid out.

The float32 computations are those of `expert_references.py`, of a sample of the tokens or some of the experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from moe_jax.benchmarking.expert_contestants import Block, Weights
from moe_jax.benchmarking.expert_references import SAMPLED_TOKENS, References, jitted_references
from moe_jax.benchmarking.expert_shapes import ExpertShape

Gradients = Callable[[Array, Array, Array, Weights, Array], tuple[Array, Array, Weights]]

TOLERANCE = 1e-2
"""Of the norm of the difference over the norm: bf16 operands, products summed in float32."""
POISON_BYTES = 2 << 30
POISON_BYTES_ON_HOST = 1 << 20


def random_weights(shape: ExpertShape, key: Array, dtype: Any = jnp.bfloat16) -> dict[str, Array | None]:
    """Weights of `fused_moe`, scaled so that activations are of order one."""
    shapes = {
        name: array.shape
        for name, array in shape.fused_moe_arguments(1, dtype).items()
        if array is not None and name not in ("x", "topk_weights", "topk_ids")
    }

    return {"gate_up_bias": None, "down_bias": None, **_draw_weights(key, tuple(sorted(shapes.items())), dtype)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_weights(key: Array, shapes: tuple[tuple[str, tuple[int, ...]], ...], dtype: Any) -> dict[str, Array]:
    drawn = {}
    for (name, size), own_key in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        scale = jnp.asarray(size[-1] ** -0.5 if name.endswith("_proj") else 1.0, dtype)
        # Expert by expert: random bits for all of the largest models' experts at once would take too much memory.
        drawn[name] = jax.lax.map(
            lambda key, size=size, scale=scale: jax.random.normal(key, size[1:], dtype) * scale,
            jax.random.split(own_key, size[0]),
        )
    return drawn


def random_tokens(shape: ExpertShape, tokens: int, key: Array, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """Tokens of order one, and router weights that add up to one."""
    return _draw_tokens(key, tokens, shape.hidden_size, shape.top_k, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw_tokens(key: Array, tokens: int, hidden_size: int, top_k: int, dtype: Any) -> tuple[Array, Array]:
    token_key, weight_key = jax.random.split(key)
    x = jax.random.normal(token_key, (tokens, hidden_size), dtype)
    return x, jax.nn.softmax(jax.random.normal(weight_key, (tokens, top_k)), axis=1)


def relative_error(result: Array | np.ndarray, expected: Array | np.ndarray) -> float:
    """‖result - expected‖ / ‖expected‖ in float64; infinite if the result holds anything that isn't a number."""
    seen, right = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    if not np.all(np.isfinite(seen)):
        return float("inf")
    norm, difference = float(np.linalg.norm(right)), float(np.linalg.norm(seen - right))
    return difference / norm if norm else difference


def poison_free_memory() -> None:
    """Fill memory with NaN and give it back, so that what an op forgets to write is likely to be NaN."""
    num_bytes = POISON_BYTES if jax.default_backend() == "gpu" else POISON_BYTES_ON_HOST
    sizes = [num_bytes // 2, *[num_bytes // 16] * 8]
    jax.block_until_ready([jnp.full(size // 4, jnp.nan, jnp.float32) for size in sizes])


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of comparing one contestant with the float32 computation."""

    what: str
    error: float
    """Largest relative error among its parts; infinite where a result isn't a number."""
    repeats: bool
    """Whether the same call gave the same bits again."""
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Within the tolerance, and the same every time."""
        return self.error <= self.tolerance and self.repeats


def lay_traps(x: Array, topk_weights: Array, topk_ids: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Take an eighth of the tokens' experts away, and fill their rows and router weights with NaN: they must stay zero."""
    tokens = x.shape[0]
    return _trapped(x, topk_weights, topk_ids, jnp.asarray(rng.permutation(tokens) < tokens // 8)[:, None])


@jax.jit
def _trapped(x: Array, topk_weights: Array, topk_ids: Array, trapped: Array) -> tuple[Array, Array, Array]:
    return (
        jnp.where(trapped, jnp.asarray(jnp.nan, x.dtype), x),
        jnp.where(trapped, jnp.nan, topk_weights),
        jnp.where(trapped, -1, topk_ids),
    )


def check_forward(
    call: Block,
    weights: Weights,
    prepared: Weights,
    shape: ExpertShape,
    topk_ids: Int[np.ndarray, "T K"],
    rng: np.random.Generator,
    *,
    with_traps: bool,
    references: References | None = None,
    dtype: Any = jnp.bfloat16,
) -> Check:
    """Compare a block with the float32 computation on a sample of the tokens.

    Args:
        call: the block, compiled; computes with `prepared`.
        weights: as `fused_moe` takes them.
        prepared: the same laid out for `call`.
        shape: of the experts.
        topk_ids: routing.
        rng: source of tokens and of the sample.
        with_traps: whether tokens without an expert are to hold NaN; part of `fused_moe`'s contract, not of others'.
        references: those of `reference_programs`, compiled, by name; None: they are compiled now.
        dtype: of the tokens.
    """
    x, topk_weights = random_tokens(shape, len(topk_ids), _key(rng), dtype)
    ids = jnp.asarray(topk_ids)
    if with_traps:
        x, topk_weights, ids = lay_traps(x, topk_weights, ids, rng)
    poison_free_memory()
    result = call(x, topk_weights, ids, prepared)
    poison_free_memory()
    repeats = _same_bits(result, call(x, topk_weights, ids, prepared))
    sample = _sample(len(topk_ids), rng)
    reference = (references or jitted_references(shape))["block"]
    expected = reference(*_sampled(x, topk_weights, ids, sample), weights)
    rows, all_finite = _rows_and_finite(result, sample)
    error = relative_error(rows, expected[: len(sample)]) if bool(all_finite) else float("inf")
    return Check("forward", error, repeats)


def gradients_of(block: Block) -> Gradients:
    """The gradients of a block in tokens, router weights and weights, as one function to compile."""

    def gradients(
        x: Array, topk_weights: Array, topk_ids: Array, weights: Weights, cotangent: Array
    ) -> tuple[Array, Array, Weights]:
        _, pullback = jax.vjp(lambda x, w, weights: block(x, w, topk_ids, weights), x, topk_weights, weights)
        return pullback(cotangent)

    return gradients


def check_backward(
    call: Gradients,
    weights: Weights,
    shape: ExpertShape,
    topk_ids: Int[np.ndarray, "T K"],
    rng: np.random.Generator,
    *,
    references: References | None = None,
    dtype: Any = jnp.bfloat16,
) -> Check:
    """Compare all gradients of a block: those in a sample of tokens, and in the weights of three experts.

    Args:
        call: `gradients_of` a block that takes weights as `fused_moe` does, compiled.
        weights: see there.
        shape: of the experts.
        topk_ids: routing.
        rng: source of tokens, of the cotangent and of the sample.
        references: those of `reference_programs`, compiled, by name; None: they are compiled now.
        dtype: of the tokens.
    """
    x, topk_weights = random_tokens(shape, len(topk_ids), _key(rng), dtype)
    ids = jnp.asarray(topk_ids)
    cotangent = jax.random.normal(_key(rng), x.shape, dtype)
    poison_free_memory()
    results = call(x, topk_weights, ids, weights, cotangent)
    again = call(x, topk_weights, ids, weights, cotangent)
    repeats = _same_bits(results, again)
    x_gradient, topk_weights_gradient, all_weights_gradients = results
    weights_gradients = {name: array for name, array in all_weights_gradients.items() if array is not None}
    sizes = np.bincount(topk_ids.reshape(-1), minlength=shape.num_experts)[: shape.local_experts]
    sample = _sample(len(topk_ids), rng)
    references = references or jitted_references(shape)
    sampled = _sampled(x, topk_weights, ids, sample)
    expected = references["tokens_gradient"](*sampled, weights, _sampled_rows(cotangent, sample))
    errors = [
        relative_error(result[sample], array[: len(sample)])
        for result, array in zip((x_gradient, topk_weights_gradient), expected, strict=True)
    ]
    for expert in np.unique([sizes.argmax(), sizes.argmin(), rng.integers(shape.local_experts)]):
        own = {name: array[expert : expert + 1] for name, array in weights.items() if array is not None}
        own_ids = jnp.where(ids == expert, 0, -1)
        of_expert = references["weights_gradient"](x, topk_weights, own_ids, own, cotangent)
        errors += [relative_error(weights_gradients[name][expert], array[0]) for name, array in of_expert.items()]
    return Check("backward", max(errors), repeats)


def _sample(tokens: int, rng: np.random.Generator) -> Int[np.ndarray, "S"]:
    return np.sort(rng.permutation(tokens)[:SAMPLED_TOKENS])


def _sampled_rows(array: Array, sample: Array | np.ndarray) -> Array:
    """Filled up to the size of the largest sample, so that the float32 computation is compiled once per shape."""
    missing = SAMPLED_TOKENS - len(sample)
    value = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
    return jnp.pad(array[sample], ((0, missing), (0, 0)), constant_values=value)


@jax.jit
def _sampled(x: Array, topk_weights: Array, ids: Array, sample: Array) -> tuple[Array, Array, Array]:
    """Sampled tokens, those without experts (traps) as zeros."""
    x, topk_weights, ids = (_sampled_rows(array, sample) for array in (x, topk_weights, ids))
    chosen = (ids >= 0).any(axis=1, keepdims=True)
    return jnp.where(chosen, x, 0), jnp.where(chosen, topk_weights, 0), ids


@jax.jit
def _rows_and_finite(result: Array, sample: Array) -> tuple[Array, Array]:
    return result[sample], jnp.isfinite(result).all()


@jax.jit
def _all_equal(one: Any, other: Any) -> Array:
    same = jax.tree.map(lambda a, b: jnp.array_equal(a, b, equal_nan=True), one, other)
    return jnp.all(jnp.stack(jax.tree.leaves(same)))


def _same_bits(one: Any, other: Any) -> bool:
    return bool(_all_equal(one, other))


def _key(rng: np.random.Generator) -> Array:
    return jax.random.key(int(rng.integers(2**31)))
