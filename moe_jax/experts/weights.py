"""The arrays of a layer's routed experts, as one pytree that can be sharded, masked and handed to an implementation."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
"""Parameters of `RoutedExperts` with an axis of experts."""


class ExpertWeights(NamedTuple):
    """Weights of E experts, stored (out, in); of the second axis, 0 is the gate and 1 the up projection."""

    gate_up_proj: Float[Array, "E 2 I H"] | Float[Array, "L E 2 I H"]
    """`[E, 1, I, H]` for an activation without a gate."""
    down_proj: Float[Array, "E H I"] | Float[Array, "L E H I"]
    gate_up_bias: Float[Array, "E 2 I"] | None = None
    down_bias: Float[Array, "E H"] | None = None
    layer: Int[Array, ""] | None = None
    """Which of the L layers these experts belong to, if the matrices are those of stacked layers."""

    def of_own_layer(self) -> Self:
        """The same with the layer's matrices taken out of the stack, which copies them."""
        if self.layer is None:
            return self
        gate_up_proj, down_proj = (
            jax.lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)
            for stack in (self.gate_up_proj, self.down_proj)
        )
        return self._replace(gate_up_proj=gate_up_proj, down_proj=down_proj, layer=None)

    def as_dtype(self, dtype: DTypeLike) -> Self:
        """The same in `dtype`; of stacked layers, all but one would be converted in vain."""
        return jax.tree.map(lambda array: array.astype(dtype), self.of_own_layer())

    def followed_by(self, wide: "ExpertWeights") -> Self:
        """These experts, and behind them the one expert `wide` as several of their width I, whose outputs add up to its own.

        Each gets as many features as any of these experts has, in their order; a bias on the output goes to the first.

        Args:
            wide: one expert of a multiple of I features, with biases if and only if these have them.
        """
        own = self.of_own_layer()
        width = own.down_proj.shape[2]
        count = wide.down_proj.shape[2] // width

        def split(array: Array, axis: int) -> Array:
            """`[1, ...]` -> `[count, ...]`, the features along `axis` dealt out."""
            parts = array[0].reshape(*array.shape[1:axis], count, width, *array.shape[axis + 1 :])
            return jnp.moveaxis(parts, axis - 1, 0)

        split_experts = type(self)(
            split(wide.gate_up_proj, 2),
            split(wide.down_proj, 2),
            None if wide.gate_up_bias is None else split(wide.gate_up_bias, 2),
            None if wide.down_bias is None else jnp.pad(wide.down_bias, ((0, count - 1), (0, 0))),
        )
        return jax.tree.map(_join, own, split_experts)


def _join(first: Array, second: Array) -> Array:
    """One behind the other. Written into place: unlike a concatenation, XLA merges that with taking `first` out of a scan."""
    dtype = jnp.promote_types(first.dtype, second.dtype)
    rest = (0,) * (first.ndim - 1)
    joined = jax.lax.empty((len(first) + len(second), *first.shape[1:]), dtype)
    joined = jax.lax.dynamic_update_slice(joined, first.astype(dtype), (0, *rest))
    return jax.lax.dynamic_update_slice(joined, second.astype(dtype), (len(first), *rest))
