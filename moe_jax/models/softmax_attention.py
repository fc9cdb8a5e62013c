"""Softmax attention, and the same for long sequences, one block of queries after the other.

The scores of all queries at once are `heads * queries * keys` numbers: 8.6 GB for a prompt of 8192 tokens and 32 heads.
In blocks, memory grows with the length and not with its square; in a gradient too, which computes a block again instead
of keeping what it computed.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.models.sequence import Visibility

SCORES_AT_ONCE = 2**24
"""Scores that are computed together: 64 MB of float32."""
FEWEST_QUERIES = 128
"""A block has at least this many queries, which keeps matrix units busy; with many heads and keys, it has more scores."""


def attend_in_blocks(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T M D"],
    value: Float[Array, "B T M V"],
    visibility: Visibility,
    *,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B S N V"]:
    """`attend`, with as many queries at once as `SCORES_AT_ONCE` allows; a sequence that is one block needs no loop."""
    batch, length, heads, _ = query.shape
    blocks = num_blocks(length, scores_per_query=batch * heads * key.shape[1])
    if blocks == 1:
        return attend(query, key, value, visibility.mask(), scale=scale, sinks=sinks)
    size = -(-length // blocks)
    rest = blocks * size - length

    def split(array: Array) -> Array:
        """[B, S, ...] as [blocks, B, size, ...], with zeros for the tokens that the last block lacks."""
        padded = jnp.pad(array, [(0, 0), (0, rest)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, blocks, size, *array.shape[2:]), 1, 0)

    # The scan behind `map` keeps the two computations of a block apart, so nothing else has to.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_block(block: tuple[Array, Array]) -> Array:
        query, places = block
        return attend(query, key, value, visibility._replace(queries=places).mask(), scale=scale, sinks=sinks)

    output = jnp.moveaxis(jax.lax.map(attend_block, (split(query), split(visibility.queries))), 0, 1)
    return output.reshape(batch, length + rest, heads, -1)[:, :length]


def num_blocks(length: int, *, scores_per_query: int) -> int:
    """How many blocks `length` queries are split into."""
    return -(-length // max(SCORES_AT_ONCE // scores_per_query, FEWEST_QUERIES))


def attend(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T M D"],
    value: Float[Array, "B T M V"],
    mask: Bool[Array, "B 1 S T"],
    *,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B S N V"]:
    """Softmax attention, N a multiple of M; the softmax is float32.

    `sinks` are logits of an imaginary key per head whose value is zero.
    """
    if sinks is not None:
        return _attend_with_sinks(query, key, value, mask, sinks, scale=scale)
    features = value.shape[-1]
    width = max(features, key.shape[-1])  # jax.nn wants one width for keys and values; zeros change nothing
    query, key, value = (_widen(array, width) for array in (query, key, value))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)[..., :features]


def _attend_with_sinks(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T M D"],
    value: Float[Array, "B T M V"],
    mask: Bool[Array, "B 1 S T"],
    sinks: Float[Array, "N"],
    *,
    scale: float,
) -> Float[Array, "B S N V"]:
    """Attention whose softmax has one more term per head.

    `jax.nn.dot_product_attention` would give the log-sum-exp that could stand for it, but lets no gradient through.
    """
    batch, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, -1)
    scores = scale * jnp.einsum("bsmgd,btmd->bmgst", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores, -0.7 * jnp.finfo(jnp.float32).max)
    sink = sinks.astype(jnp.float32).reshape(kv_heads, -1)[None, :, :, None, None]
    largest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sink))
    weights = jnp.exp(scores - largest)
    weights /= weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - largest)
    output = jnp.einsum("bmgst,btmv->bsmgv", weights.astype(value.dtype), value)
    return output.reshape(batch, length, heads, -1)


def _widen(array: Float[Array, "B T N D"], width: int) -> Float[Array, "B T N W"]:
    """Append zeros to the last axis."""
    missing = width - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array
