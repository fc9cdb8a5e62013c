"""What is computed in another way where no gradient is taken.

- Weights of stacked layers are read where they lie. What a kernel takes is an array; a layer's weights, indexed out of a stack, are
  a new one, which XLA writes and reads again at every call, the experts that no token chose included. So kernels are given the
  stack, and which of its matrices is the first. With a gradient there would be one of the whole stack per call, zero but for
  one layer. There the weights are indexed as usual: the copy is small beside the work of training, and the gradient of an index
  into a scanned stack is what XLA knows to write in place.
- Rows of one rank of many come in rounds much sooner; see `rounds.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from .request import Request

_FLOATING = ("x", "topk_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
_INTEGERS = ("topk_ids", "expert_offset", "layer")


def run_for_inference(run: Callable[[Request], Array], request: Request) -> Array:
    """`run(request)`, whose gradient is that of `run(request.for_gradient())`; `run` needs gradients on such requests only."""

    def filled(floating: dict[str, Any], integers: dict[str, Any]) -> Request:
        return dataclasses.replace(request, **floating, **integers)

    @jax.custom_vjp
    def compute(floating: dict[str, Any], integers: dict[str, Any]) -> Array:
        return run(filled(floating, integers))

    def forward(floating: dict[str, Any], integers: dict[str, Any]) -> tuple[Array, Callable[..., Any]]:
        return jax.vjp(lambda floating: run(filled(floating, integers).for_gradient()), floating)

    def backward(pullback: Callable[..., Any], cotangent: Array) -> tuple[Any, None]:
        return *pullback(cotangent), None

    compute.defvjp(forward, backward)
    floating, integers = ({name: getattr(request, name) for name in names} for names in (_FLOATING, _INTEGERS))
    return compute(floating, integers)
