"""How logits become tokens: pure functions, float32, ties to the lowest token id."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The most likely token of each row, int32; of equals, the one with the lowest id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Float[Array, ""]
) -> Float[Array, "B V"]:
    """Logits, float32, in which those of `seen` tokens are divided by `penalty` if positive and multiplied otherwise.

    Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1, as in `transformers`' `RepetitionPenaltyLogitsProcessor`.
    """
    logits = logits.astype(jnp.float32)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def in_nucleus(ranked_logits: Float[Array, "B V"], top_p: float | Float[Array, ""]) -> Bool[Array, "B V"]:
    """Which tokens form the smallest set whose probabilities sum to at least `top_p`.

    Args:
        ranked_logits: logits in descending order.
        top_p: probability in (0, 1].

    Returns:
        True for a leading run of every row: a token belongs to the set if the tokens before it do not reach `top_p`;
        the first one always does.

    Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """
    probabilities = jax.nn.softmax(ranked_logits.astype(jnp.float32), axis=-1)
    reached_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return (reached_before < top_p).at[:, 0].set(True)


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Int[Array, "B"]:
    """Draw one token per row from softmax(logits / temperature), restricted by `top_k` and then by `top_p`.

    Args:
        logits: any float dtype; computed in float32.
        keys: one key per row, so that what a row draws does not depend on its neighbours.
        temperature: positive; may be traced.
        top_k: how many of the best tokens may be drawn; None: all. Of tokens that tie for the last place, those with
            the lowest ids may.
        top_p: see `in_nucleus`, applied to what `top_k` left, renormalised; may be traced; None: no restriction.

    Returns:
        Token ids, int32.
    """
    logits = logits.astype(jnp.float32)
    # The best token's quotient is 0 whatever the temperature, and a temperature too small for float32 still leaves only it.
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    vocab_size = logits.shape[-1]
    if top_k is None and top_p is None:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    # `top_k` returns the best first and of equals the lowest id first, so it ranks for the nucleus too.
    ranked_logits, ranked_ids = jax.lax.top_k(logits, vocab_size if top_k is None else min(top_k, vocab_size))
    if top_p is not None:
        ranked_logits = jnp.where(in_nucleus(ranked_logits, top_p), ranked_logits, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked_logits)
    return jnp.take_along_axis(ranked_ids, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def seed_key(seed: int) -> Key[Array, ""]:
    """The key that all randomness of a generation comes from: of a seed from -2^63 to 2^63 - 1, every bit counts.

    `jax.random.key` takes the lower 32 bits only, unless 64-bit types are enabled.
    """
    lower, upper = seed % 2**32, (seed >> 32) % 2**32
    key = jax.random.key(lower)
    return jax.random.fold_in(key, upper) if upper else key


def row_keys(seed_key: Key[Array, ""], step: Int[Array, ""], rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """The keys that `sample` takes at one step: what a row draws depends on the seed, its number and the step alone."""
    step_key = jax.random.fold_in(seed_key, step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, rows)
