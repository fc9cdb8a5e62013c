"""The validated arguments of the fused MoE block."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..activations import Activation
from ..argument_checks import (
    check_dtype_beside,
    check_floating,
    check_integer_scalar,
    check_integers,
    check_known_sizes,
)
from ..device import gpu_device_of, tpu_device_of
from ..selection import platform_of
from ..varying import equally_varying
from .expert_block import ExpertMatrices


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Arguments of `fused_moe`, checked once; arrays, tracers or (to explain a choice) `jax.ShapeDtypeStruct`s."""

    x: Any
    topk_weights: Any
    topk_ids: Any
    gate_up_proj: Any
    down_proj: Any
    gate_up_bias: Any
    down_bias: Any
    activation: Activation
    expert_offset: int | Array
    layer: int | Array | None
    apply_router_weight_on_input: bool
    recompute_activation: bool
    expected_rows: int
    """About how many of the T * K choices name an expert whose weights are given."""
    platform: str
    gpu: Any
    """The `GpuDevice` that computes, or None."""
    tpu: Any
    """The `TpuDevice` that computes, or None."""
    takes_gradient: bool = False
    """Whether it is computed as for a gradient; see `inference.py`."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.x.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.x.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.topk_ids.shape[1]

    @property
    def num_experts(self) -> int:
        """E, the experts of a layer whose weights are given."""
        return self.gate_up_proj.shape[-4]

    @property
    def projections(self) -> int:
        """P."""
        return self.gate_up_proj.shape[-3]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.gate_up_proj.shape[-2]

    @classmethod
    def of(
        cls,
        x: Any,
        topk_weights: Any,
        topk_ids: Any,
        gate_up_proj: Any,
        down_proj: Any,
        *,
        gate_up_bias: Any,
        down_bias: Any,
        activation: str | Activation,
        expert_offset: int | Array = 0,
        layer: int | Array | None = None,
        apply_router_weight_on_input: bool,
        recompute_activation: bool,
        expected_rows: int | None = None,
    ) -> Self:
        """Check the arguments and describe them.

        Raises:
            ValueError: sizes that are symbolic, shapes that do not fit each other, an illegal activation, or more rows expected
                than there can be.
            TypeError: dtypes that are not floating (arrays) or integer (ids), or that differ; an offset or layer that is not one
                integer.
        """
        activation = Activation.of(activation)
        check_known_sizes(x=x, topk_ids=topk_ids, gate_up_proj=gate_up_proj)
        check_integer_scalar("expert_offset", expert_offset)
        if layer is not None:
            check_integer_scalar("layer", layer)
        request = cls(
            x,
            topk_weights,
            topk_ids,
            gate_up_proj,
            down_proj,
            gate_up_bias,
            down_bias,
            activation,
            expert_offset,
            layer,
            apply_router_weight_on_input,
            recompute_activation,
            topk_ids.size if expected_rows is None else max(1, expected_rows),
            platform_of(gate_up_proj, x),
            gpu_device_of(gate_up_proj, x),
            tpu_device_of(gate_up_proj, x),
        )
        request._check_tokens()
        request._check_weights()
        request._check_dtypes()
        if expected_rows is not None and not 0 <= expected_rows <= topk_ids.size:
            raise ValueError(f"expected_rows must be in [0, T * K] = [0, {topk_ids.size}], got {expected_rows}")
        return request

    def _check_tokens(self) -> None:
        """Raise ValueError unless the shapes of tokens, router weights and ids fit each other."""
        x, topk_weights, topk_ids = self.x, self.topk_weights, self.topk_ids
        if x.ndim != 2:
            raise ValueError(f"x must be [T, H], got shape {x.shape}")
        if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0] or topk_ids.shape[1] < 1:
            raise ValueError(f"topk_ids must be [T, K] with T={x.shape[0]} and K >= 1, got shape {topk_ids.shape}")
        if topk_weights.shape != topk_ids.shape:
            raise ValueError(
                f"topk_weights must be [T, K] = {topk_ids.shape} as topk_ids, got shape {topk_weights.shape}"
            )

    def _check_weights(self) -> None:
        """Raise ValueError unless the shapes of weights fit each other, the tokens, the activation and the layer."""
        layer, gate_up_shape = self.layer, self.gate_up_proj.shape
        projections = 2 if self.activation.is_gated else 1
        num_axes, letter = (4, "") if layer is None else (5, "L, ")
        has_axes = len(gate_up_shape) == num_axes
        if not has_axes or self.projections != projections or 0 in (self.num_experts, self.intermediate_size):
            raise ValueError(
                f"gate_up_proj must be [{letter}E, {projections}, I, H] with E, I >= 1 for activation"
                f" {self.activation.name!r} and layer={layer}, got shape {gate_up_shape}"
            )
        stacked, (num_experts, _, intermediate_size, hidden_size) = gate_up_shape[:-4], gate_up_shape[-4:]
        if isinstance(layer, int | np.integer) and not 0 <= layer < stacked[0]:
            raise ValueError(f"layer must be in [0, {stacked[0]}), the layers of gate_up_proj; got {layer}")
        expected = {
            "x": ((self.num_tokens, hidden_size), "[T, H]"),
            "down_proj": ((*stacked, num_experts, hidden_size, intermediate_size), f"[{letter}E, H, I]"),
            "gate_up_bias": (gate_up_shape[-4:-1], "[E, 2 (1 if not gated), I]"),
            "down_bias": ((num_experts, hidden_size), "[E, H]"),
        }
        for name, (shape, letters) in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"{name} must be {letters} = {shape} beside gate_up_proj {gate_up_shape}, got shape {array.shape}"
                )

    def _check_dtypes(self) -> None:
        """Raise TypeError unless ids are integers, and the rest is floating and of dtypes that go together."""
        floating = ("topk_weights", "x", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        check_floating(**{name: getattr(self, name) for name in floating})
        check_dtype_beside("x", self.x, gate_up_proj=self.gate_up_proj, down_proj=self.down_proj)
        check_integers(topk_ids=self.topk_ids)

    def expert_weights(self) -> ExpertMatrices:
        """The weights; those of stacked layers as one long list of matrices, without a copy if they needn't be converted."""
        if self.layer is None or self.gate_up_proj.dtype != self.x.dtype or self.down_proj.dtype != self.x.dtype:
            own = self.of_own_layer()
            return ExpertMatrices(own.gate_up_proj, own.down_proj, own.gate_up_bias, own.down_bias)
        gate_up_proj, down_proj = (stack.reshape(-1, *stack.shape[2:]) for stack in (self.gate_up_proj, self.down_proj))
        first_matrix = self._layer_in_stack() * self.num_experts
        return ExpertMatrices(gate_up_proj, down_proj, self.gate_up_bias, self.down_bias, first_matrix)

    def of_own_layer(self) -> Self:
        """The same with the matrices of `layer` taken out of the stack."""
        if self.layer is None:
            return self
        gate_up_proj, down_proj = (
            jax.lax.dynamic_index_in_dim(stack, self._layer_in_stack(), keepdims=False)
            for stack in (self.gate_up_proj, self.down_proj)
        )
        return dataclasses.replace(self, layer=None, gate_up_proj=gate_up_proj, down_proj=down_proj)

    def for_gradient(self) -> Self:
        """The same, to be computed in the way that a gradient is taken of."""
        return dataclasses.replace(self.of_own_layer(), takes_gradient=True)

    def _layer_in_stack(self) -> Array:
        """`layer`, or the nearest that there is: kernels would read beyond the stack."""
        return jnp.clip(jnp.asarray(self.layer, jnp.int32), 0, self.gate_up_proj.shape[0] - 1)

    def equally_varying(self) -> Self:
        """The same arguments, fit to meet each other in loops and custom gradients inside `jax.shard_map`."""
        names = ("x", "topk_weights", "topk_ids", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        arrays = equally_varying(*(getattr(self, name) for name in names), self.expert_offset, self.layer)
        return dataclasses.replace(self, **dict(zip(names, arrays, strict=False)))
