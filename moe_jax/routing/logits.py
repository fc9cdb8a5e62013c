"""Hidden states → router logits, in float32 whatever the parameters are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize_router_input(
    hidden_states: Float[Array, "T H"], scale: Float[Array, "H"], *, epsilon: float
) -> Float[Array, "T H"]:
    """RMS-normalised hidden states, times `H ** -0.5`, times a learned scale per feature, in float32 (Gemma 4).

    Source: vLLM `gemma4.py`; spec 2.7.
    """
    x = hidden_states.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return x * x.shape[-1] ** -0.5 * scale.astype(jnp.float32)


def compute_router_logits(
    hidden_states: Float[Array, "T H"], weight: Float[Array, "E H"], bias: Float[Array, "E"] | None = None
) -> Float[Array, "T E"]:
    """`hidden_states @ weight.T (+ bias)` in true float32: a router that rounds differently picks other experts."""
    logits = jnp.einsum(
        "th,eh->te",
        hidden_states.astype(jnp.float32),
        weight.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return logits if bias is None else logits + bias.astype(jnp.float32)
