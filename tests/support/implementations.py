"""What the shared test suites must know of an implementation to ask it for something that it can compute, and judge the answer."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_interpretation import interpreting
from support.rounding import ROUNDED_ONCE
from support.tpu_interpretation import interpreting_tpu

from moe_jax.kernels.device import GPU_DEVICES, TPU_DEVICES, GpuDevice, TpuDevice

# Of gradients in bfloat16. Five roundings of up to 2**-8 each may all go the same way in one value. What is wrong throughout
# shows in the norm, which has room for small arrays, whose errors do not average out.
BFLOAT16_GRADIENT_ERROR = 2e-2
BFLOAT16_GRADIENT_NORM_ERROR = 8e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImplementationUnderTest:
    """One implementation of an op, by the name that both ops know it by."""

    name: str
    dtype: str = "float32"
    """Of rows and weights."""
    width_multiple: int = 1
    """What H, I, D and N must be multiples of."""
    rounding: float = 2e-5
    """Largest error of a product that is rounded to `dtype` once, relative to the largest value."""
    block_error: float = 5e-5
    """Largest error of `fused_moe`, relative to the largest value."""
    block_norm_error: float = 2e-5
    """Norm of the error of `fused_moe`, relative to the norm of the exact value."""
    gradient_error: float = 5e-5
    """The same of its gradients."""
    gradient_norm_error: float = 2e-5
    """The same of its gradients."""
    running: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """Context in which calls of it run on a machine that has CPUs only."""
    is_slow: bool = False
    """Whether a call takes seconds."""
    runs_on_meshes: bool = True
    """Whether devices of a mesh may run it side by side: jax's interpreter of Mosaic GPU takes their calls for one, and that of
    TPUs has the devices wait for each other at every kernel, so that they hang if two kernels run in another order on each."""
    runs_rematerialised: bool = True
    """Whether it runs inside `jax.checkpoint`, which takes no side effects: jax's interpreters of kernels have some. Tracing for
    the device itself passes it."""
    target: GpuDevice | TpuDevice = GPU_DEVICES["h200"]
    """A device that it can be traced for."""

    def width(self, width: int) -> int:
        """The width itself, or the next one that the implementation takes."""
        return -(-width // self.width_multiple) * self.width_multiple


UNDER_TEST = {
    implementation.name: implementation
    for implementation in (
        ImplementationUnderTest(name="reference"),
        ImplementationUnderTest(name="xla"),
        ImplementationUnderTest(
            name="pallas_gpu",
            dtype="bfloat16",
            width_multiple=16,
            rounding=ROUNDED_ONCE["bfloat16"],
            # Rounded on the way: the activated rows, each expert's result, and their sum; gradients a time or two more.
            block_error=1e-2,
            block_norm_error=5e-3,
            gradient_error=BFLOAT16_GRADIENT_ERROR,
            gradient_norm_error=BFLOAT16_GRADIENT_NORM_ERROR,
            running=interpreting,
            is_slow=True,
            runs_on_meshes=False,
            runs_rematerialised=False,
        ),
        ImplementationUnderTest(
            name="pallas_tpu",
            running=interpreting_tpu,
            is_slow=True,
            runs_on_meshes=False,
            runs_rematerialised=False,
            target=TPU_DEVICES["v6e"],
        ),
    )
}


def each_implementation(modules: Iterable[Any], *, sampled: bool = False) -> pytest.MarkDecorator:
    """Run a test with every implementation of an op, as its argument `implementation`.

    Args:
        modules: the implementations that the op lists, each of which must be described here.
        sampled: whether `make test` runs the test with slow implementations too; otherwise they wait for `make test-slow`.
    """
    described = [UNDER_TEST[module.NAME] for module in modules]
    parameters = [pytest.param(each, id=each.name, marks=_marks(each, sampled)) for each in described]
    return pytest.mark.parametrize("implementation", parameters)


def each_implementation_with(
    modules: Iterable[Any],
    argument: str,
    values: Sequence[Any],
    *,
    sampled: Sequence[Any] = (),
    left_out: Sequence[Any] = (),
) -> pytest.MarkDecorator:
    """The same with every value of one more argument.

    Args:
        modules: the implementations that the op lists.
        argument: the argument's name.
        values: its values.
        sampled: those that slow implementations get in `make test` too.
        left_out: those that slow implementations never get, because their kernels are called as with another value.
    """
    described = [UNDER_TEST[module.NAME] for module in modules]
    parameters = [
        pytest.param(each, value, id=f"{each.name}-{value}", marks=_marks(each, value in sampled))
        for each in described
        for value in values
        if not (each.is_slow and value in left_out)
    ]
    return pytest.mark.parametrize(("implementation", argument), parameters)


def _marks(implementation: ImplementationUnderTest, sampled: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if implementation.is_slow and not sampled else []


def assert_close(
    result: Any, expected: Any, largest_error: float, norm_error: float | None = None, scale: float = 0
) -> None:
    """Every error is at most `largest_error` times the largest exact value, and their norm `norm_error` times its norm.

    Values that are small because their terms cancel count as `scale`.
    """
    result, expected = np.asarray(jnp.asarray(result), np.float64), np.asarray(expected, np.float64)
    bound = largest_error * np.abs(expected).max(initial=scale) + 1e-30
    np.testing.assert_allclose(result, expected, rtol=0, atol=bound)
    if norm_error is not None:
        error = np.linalg.norm(result - expected)
        norm = max(np.linalg.norm(expected), scale * np.sqrt(expected.size))
        assert error <= norm_error * norm + 1e-30, f"norm of the error is {error}"
