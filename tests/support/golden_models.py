"""Models loaded from golden cases, and a way to compile functions of them quickly and only once per case."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx
from support.golden_cases import GoldenCase

from moe_jax import from_pretrained
from moe_jax.models import CausalLM

TOLERANCE = 1e-4
"""Largest difference of float32 logits, in units of their standard deviation."""

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
"""Test models are so small that compiling them takes longer than running them."""


@cache
def golden_model(case: GoldenCase, form: str | None = None) -> CausalLM:
    """The model of a case in float32, from its first form by default."""
    return from_pretrained(case.folder(form or case.forms[0]), dtype=np.float32)


@cache
def compiled(case: GoldenCase, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(model, *args)` as `f(model, *args)`, compiled once for all forms of the case."""
    graph = nnx.graphdef(golden_model(case))
    program = jax.jit(lambda state, *args: function(nnx.merge(graph, state), *args), compiler_options=QUICK_TO_COMPILE)
    return lambda model, *args: program(nnx.state(model), *args)


def relative_error(actual: Any, expected: np.ndarray, where: np.ndarray | None = None) -> float:
    """Largest difference over the standard deviation of `expected`, at the tokens `where` (default: everywhere)."""
    actual = np.asarray(actual, np.float64)
    if where is not None:
        actual, expected = actual[where], expected[where]
    return float(np.abs(actual - expected).max() / expected.std(dtype=np.float64))
