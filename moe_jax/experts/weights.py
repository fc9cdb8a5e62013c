"""The arrays of a layer's routed experts, as one pytree that can be sharded, masked and handed to an implementation."""

from typing import NamedTuple

from jaxtyping import Array, Float


class ExpertWeights(NamedTuple):
    """Weights of E experts, stored (out, in); of the second axis, 0 is the gate and 1 the up projection."""

    gate_up_proj: Float[Array, "E 2 I H"]
    """`[E, 1, I, H]` for an activation without a gate."""
    down_proj: Float[Array, "E H I"]
    gate_up_bias: Float[Array, "E 2 I"] | None = None
    down_bias: Float[Array, "E H"] | None = None
