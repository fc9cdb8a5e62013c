"""The interface of a Mixture-of-Experts layer."""

import abc
from typing import Any, Literal, TypedDict, Unpack, overload

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.runner.aux import MoEAux


class LayerInputs(TypedDict, total=False):
    """What a call may bring beside hidden states; `MoERunner.__call__` describes each."""

    router_logits: Float[Array, "... E"] | None
    input_ids: Int[Array, "..."] | None
    shared_experts_input: Float[Array, "... D"] | None
    forced_ids: Int[Array, "... K"] | None
    token_mask: Bool[Array, "..."] | Int[Array, "..."] | None
    key: Array | None


class MoERunnerInterface(nnx.Module, abc.ABC):
    """A layer that routes tokens to experts: hidden states in, hidden states of the same shape out.

    Attributes:
        shared_experts: the dense experts that every token passes, or None.
    """

    shared_experts: Any

    @property
    @abc.abstractmethod
    def is_internal_router(self) -> bool:
        """Whether the layer computes router logits itself; otherwise every call must bring `router_logits`."""

    @overload
    def __call__(
        self, hidden_states: Array, *, with_aux: Literal[False] = False, **inputs: Unpack[LayerInputs]
    ) -> Array: ...
    @overload
    def __call__(
        self, hidden_states: Array, *, with_aux: Literal[True], **inputs: Unpack[LayerInputs]
    ) -> tuple[Array, MoEAux]: ...
    @overload
    def __call__(
        self, hidden_states: Array, *, with_aux: bool, **inputs: Unpack[LayerInputs]
    ) -> Array | tuple[Array, MoEAux]: ...
    @abc.abstractmethod
    def __call__(
        self,
        hidden_states: Float[Array, "... H"],
        *,
        router_logits: Float[Array, "... E"] | None = None,
        input_ids: Int[Array, "..."] | None = None,
        shared_experts_input: Float[Array, "... D"] | None = None,
        forced_ids: Int[Array, "... K"] | None = None,
        token_mask: Bool[Array, "..."] | Int[Array, "..."] | None = None,
        key: Array | None = None,
        with_aux: bool = False,
    ) -> Float[Array, "... H"] | tuple[Float[Array, "... H"], MoEAux]:
        """Route, run the experts and combine; see `MoERunner`."""
