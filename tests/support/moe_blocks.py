"""Random arguments of `fused_moe` that an implementation can compute, and what the oracle says about them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracles import expert_gradients
from oracles import experts as oracle
from support.implementations import ImplementationUnderTest, assert_close

from moe_jax.kernels import Activation, fused_moe
from moe_jax.kernels.device import targeting

HELD_NAMES = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
"""Arguments that belong to experts, which devices may share out."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Arguments of `fused_moe` for one implementation."""

    implementation: ImplementationUnderTest
    arrays: dict[str, Any]
    activation: Activation
    apply_router_weight_on_input: bool = False

    @classmethod
    def draw(
        cls,
        rng,
        implementation,
        *,
        tokens=19,
        experts=7,
        top_k=3,
        hidden=24,
        intermediate=20,
        activation="silu",
        bias=False,
        dtype=None,
        weights_dtype=None,
        **kwargs,
    ):
        """In the implementation's dtype unless another is given, and of the nearest widths that it takes."""
        activation = Activation.of(activation)
        projections = 2 if activation.is_gated else 1
        hidden, intermediate = implementation.width(hidden), implementation.width(intermediate)
        dtype = dtype or implementation.dtype

        def normal(*shape, scale=1.0, dtype=dtype):
            return jnp.array(rng.normal(size=shape) * scale, dtype)

        weights = functools.partial(normal, dtype=weights_dtype or dtype)
        arrays = {
            "x": normal(tokens, hidden),
            "topk_weights": jnp.array(rng.uniform(0.1, 1, size=(tokens, top_k)), jnp.float32),
            "topk_ids": jnp.array(
                np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].reshape(tokens, top_k), jnp.int32
            ),
            "gate_up_proj": weights(experts, projections, intermediate, hidden, scale=hidden**-0.5),
            "down_proj": weights(experts, hidden, intermediate, scale=intermediate**-0.5),
        }
        if bias:
            arrays["gate_up_bias"] = normal(experts, projections, intermediate)
            arrays["down_bias"] = normal(experts, hidden)
        return cls(implementation, arrays, activation, **kwargs)

    def draw_cotangent(self, rng):
        """Of the result."""
        return jnp.array(rng.normal(size=self.arrays["x"].shape), self.arrays["x"].dtype)

    def with_arrays(self, **arrays):
        """The same block with some arrays replaced."""
        return dataclasses.replace(self, arrays={**self.arrays, **arrays})

    def held(self, first, last):
        """The block as a device has it that holds these experts only."""
        held = {name: array[first:last] for name, array in self.arrays.items() if name in HELD_NAMES}
        return self.with_arrays(**held)

    @property
    def options(self):
        """Arguments that are no arrays."""
        return dict(
            activation=self.activation,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            implementation=self.implementation.name,
        )

    def run(self, **kwargs):
        """The implementation's result."""
        with self.implementation.running():
            return _run(self.arrays, **self.options, **kwargs)

    def run_before_gradient(self):
        """The implementation's result as it is computed where a gradient follows."""

        def function(floating):
            return fused_moe(topk_ids=self.arrays["topk_ids"], **floating, **self.options)

        with self.implementation.running():
            return jax.jit(lambda floating: jax.vjp(function, floating)[0])(self._floating)

    def gradients(self, cotangent, *, wrap: Callable[[Callable], Callable] = lambda function: function, **kwargs):
        """The implementation's gradients of sum(result * cotangent) with respect to every floating argument."""
        with self.implementation.running():
            return jax.jit(self._gradient_function(cotangent, wrap, kwargs))(self._floating)

    def traced_gradients(self, cotangent, *, wrap: Callable[[Callable], Callable], **kwargs):
        """The shapes and dtypes of these gradients, traced for the implementation's device."""
        with targeting(self.implementation.target):
            return jax.eval_shape(self._gradient_function(cotangent, wrap, kwargs), self._floating)

    @property
    def _floating(self):
        return {name: array for name, array in self.arrays.items() if name != "topk_ids"}

    def _gradient_function(self, cotangent, wrap, kwargs):
        def loss(floating):
            result = fused_moe(topk_ids=self.arrays["topk_ids"], **floating, **self.options, **kwargs)
            return jnp.vdot(result, cotangent, preferred_element_type=jnp.float32)

        return jax.grad(wrap(loss))

    def activate(self, *projected):
        """The activation by the oracle."""
        parameters = {name: getattr(self.activation, name) for name in ("limit", "alpha", "beta")}
        return oracle.activate(self.activation.name, *projected, **parameters)

    def exact(self, function, **kwargs):
        """What a function of an oracle says about this block, in float64, whatever the dtypes."""
        arrays = {
            name: np.asarray(array, np.int64 if name == "topk_ids" else np.float64)
            for name, array in self.arrays.items()
        }
        on_input = self.apply_router_weight_on_input
        return function(**{**arrays, **kwargs}, activate=self.activate, apply_router_weight_on_input=on_input)

    def expected(self, **kwargs):
        """The exact result."""
        return self.exact(oracle.fused_moe, **kwargs)

    def expected_gradients(self, cotangent, **kwargs):
        """The exact gradients, by argument."""
        return self.exact(expert_gradients.fused_moe, cotangent=np.asarray(cotangent, np.float64), **kwargs)

    def assert_close(self, result, expected):
        """As close as the implementation promises."""
        assert_close(result, expected, self.implementation.block_error, self.implementation.block_norm_error)

    def assert_right(self, **kwargs):
        """The implementation's result is right, and of the dtype of x."""
        result = self.run(**kwargs)
        assert result.dtype == self.arrays["x"].dtype
        self.assert_close(result, self.expected())

    def assert_gradients_right(self, gradients, cotangent, **kwargs):
        """Gradients are right, and of the dtypes of their arguments."""
        expected = self.expected_gradients(cotangent, **kwargs)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == self.arrays[name].dtype, name
            # A router weight's gradient is a scalar product with the cotangent: of few tokens, all may be small by cancellation.
            scale = np.linalg.norm(np.float64(cotangent), axis=1).max(initial=0) if name == "topk_weights" else 0
            bounds = self.implementation.gradient_error, self.implementation.gradient_norm_error
            assert_close(gradient, expected[name], *bounds, scale)


@functools.partial(
    jax.jit, static_argnames=("activation", "apply_router_weight_on_input", "expected_rows", "implementation")
)
def _run(arrays, **kwargs):
    return fused_moe(**arrays, **kwargs)
