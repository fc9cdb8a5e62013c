"""The definition of the fused MoE block, for tests and for reading: every expert on every (token, choice), masked. Slow."""

import jax
import jax.numpy as jnp
from jax import Array

from ..rounding import rounded_to
from ..selection import Formulation
from ..varying import varying_like
from .request import Request

NAME = "reference"


def unsupported(request: Request) -> str | None:
    """Nothing is."""
    return None


def formulation(request: Request) -> Formulation:
    """There is one only."""
    return Formulation("every expert on every token, masked", "it is the definition")


def run(request: Request) -> Array:
    """Sum over a token's choices of weight * expert(token), or of expert(weight * token), in float32."""
    request = request.of_own_layer()
    x, top_k = request.x, request.top_k
    wide = jnp.promote_types(x.dtype, jnp.float32)
    pair_ids = request.topk_ids.reshape(-1, 1).astype(jnp.int32) - request.expert_offset
    pair_weights = request.topk_weights.reshape(-1, 1).astype(wide)
    pair_rows = jnp.repeat(x, top_k, axis=0)

    def add_expert(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        number, gate_up_proj, down_proj, gate_up_bias, down_bias = expert
        chosen = pair_ids == number
        weights = jnp.where(chosen, pair_weights, 0)
        rows = jnp.where(chosen, pair_rows, 0)
        if request.apply_router_weight_on_input:
            rows = (rows * weights).astype(x.dtype)
        projected = jnp.einsum("th,pih->pti", rows, gate_up_proj, preferred_element_type=wide) + gate_up_bias[:, None]
        activated = request.activation(*projected).astype(x.dtype)
        result = jnp.einsum("ti,hi->th", activated, down_proj, preferred_element_type=wide) + down_bias
        if not request.apply_router_weight_on_input:
            result = result * weights
        return total + jnp.where(chosen, result, 0), None

    def bias_or_zero(bias: Array | None, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, wide) if bias is None else bias.astype(wide)

    experts = (
        jnp.arange(request.num_experts, dtype=pair_ids.dtype),
        rounded_to(request.gate_up_proj, x.dtype),
        rounded_to(request.down_proj, x.dtype),
        bias_or_zero(request.gate_up_bias, request.gate_up_proj.shape[:3]),
        bias_or_zero(request.down_bias, request.down_proj.shape[:2]),
    )
    nothing = varying_like(jnp.zeros(pair_rows.shape, wide), x)
    pairs, _ = jax.lax.scan(add_expert, nothing, experts)
    return pairs.reshape(-1, top_k, request.hidden_size).sum(axis=1).astype(x.dtype)
