"""Shared experts: the dense MLP that every token passes, optionally scaled by a sigmoid gate (spec 1.7)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.experts.weights import ExpertWeights
from moe_jax.kernels import Activation


def promote_to_input_dtype(arrays: Sequence[Any], /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Convert `arrays` to `dtype`, or to that of the first one, the layer's input.

    Flax's own rule with dtype=None takes the widest of all, so that bfloat16 tokens would be computed in the float32
    of the parameters; a layer here computes in the dtype of its tokens.
    """
    del inexact  # part of the signature of nnx.Linear's `promote_dtype`
    target = arrays[0].dtype if dtype is None else dtype
    return tuple(None if array is None else jnp.asarray(array, target) for array in arrays)


class SharedExperts(nnx.Module):
    """`down_proj(activation(gate_proj(x), up_proj(x)))`, times `sigmoid(gate(x))` with `sigmoid_gate` (Qwen2-MoE).

    Children are `nnx.Linear` (kernel `[in, out]`): `gate_proj` (None for an activation without a gate), `up_proj`,
    `down_proj`, and `gate` (kernel `[H, 1]`, no bias; None without `sigmoid_gate`).

    Attributes:
        hidden_size: H, the width of its tokens.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        """Create the projections.

        Args:
            config: the layer; its `shared_experts` must be set.
            rngs: source of the `params` keys.

        Raises:
            ValueError: the config has no shared experts.
        """
        shared = config.shared_experts
        if shared is None:
            raise ValueError("SharedExperts needs config.shared_experts, got None")
        self.activation = Activation.of(config.activation)
        self.hidden_size = hidden = config.hidden_size if shared.hidden_size is None else shared.hidden_size

        def linear(features_in: int, features_out: int, *, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features_out,
                use_bias=bias,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                promote_dtype=promote_to_input_dtype,
                rngs=rngs,
            )

        width = shared.intermediate_size
        self.gate_proj = nnx.data(linear(hidden, width, bias=shared.bias) if self.activation.is_gated else None)
        self.up_proj = linear(hidden, width, bias=shared.bias)
        self.down_proj = linear(width, hidden, bias=shared.bias)
        self.gate = nnx.data(linear(hidden, 1, bias=False) if shared.sigmoid_gate else None)

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        """The shared experts' output, in the dtype of `x` or the config's.

        Raises:
            ValueError: `x` has another width than the projections.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"the shared experts need tokens [..., {self.hidden_size}], got shape {list(x.shape)}")
        up = self.up_proj(x)
        inner = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x), up)
        output = self.down_proj(inner)
        return output if self.gate is None else output * jax.nn.sigmoid(self.gate(x))

    def as_expert(self) -> ExpertWeights:
        """The parameters as those of one expert of the same width, for shared experts without a sigmoid gate."""
        projections = [part for part in (self.gate_proj, self.up_proj) if part is not None]
        biases = [part.bias[...] for part in projections if part.bias is not None]
        return ExpertWeights(
            gate_up_proj=jnp.stack([part.kernel[...].T for part in projections])[None],
            down_proj=self.down_proj.kernel[...].T[None],
            gate_up_bias=jnp.stack(biases)[None] if biases else None,
            down_bias=None if self.down_proj.bias is None else self.down_proj.bias[...][None],
        )
