"""The feed-forward part of layers without a Mixture of Experts."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from moe_jax.families.decoder import DenseFeedForward
from moe_jax.kernels import Activation


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
