"""The feed-forward part of a layer: a dense gated MLP, or a Mixture of Experts that padding doesn't enter."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.families.decoder import DenseFeedForward
from moe_jax.kernels import Activation
from moe_jax.runner import MoEAux, MoERunner


class GatedMLP(nnx.Module):
    """`down_proj(activation(gate_proj(x)) * up_proj(x))`; all three are `nnx.Linear`."""

    def __init__(
        self, description: DenseFeedForward, *, hidden_size: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        """Create the parameters in `param_dtype`; computation is in `dtype`."""
        self.activation = Activation.of(description.activation)
        width = description.intermediate_size
        options: dict[str, Any] = {
            "use_bias": description.bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs
        }  # fmt: skip
        self.gate_proj = nnx.Linear(hidden_size, width, **options)
        self.up_proj = nnx.Linear(hidden_size, width, **options)
        self.down_proj = nnx.Linear(width, hidden_size, **options)

    def __call__(self, x: Float[Array, "B S H"]) -> Float[Array, "B S H"]:
        """The MLP's output, in its computation dtype."""
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))


def run_mixture(
    mixture: MoERunner,
    x: Float[Array, "B S H"],
    *,
    is_real: Bool[Array, "B S"] | None,
    forced_ids: Int[Array, "B S K"] | None,
) -> tuple[Float[Array, "B S H"], MoEAux]:
    """Run a Mixture of Experts in which padding goes to no expert (id -1) and counts in no load."""
    router_logits = None
    if is_real is not None:
        if forced_ids is None:
            routing = mixture.router(x.reshape(-1, x.shape[-1]))
            router_logits = routing.router_logits.reshape(*x.shape[:-1], -1)
            forced_ids = jnp.reshape(routing.topk_ids, (*x.shape[:-1], -1))
        forced_ids = jnp.where(is_real[..., None], forced_ids, -1)
    result: Any = mixture(x, router_logits=router_logits, forced_ids=forced_ids, with_aux=True)
    return result
