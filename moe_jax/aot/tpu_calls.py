"""The Pallas TPU kernels that a program calls, with the scalars that it gives them; compiling one of them alone."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal  # pyright: ignore[reportPrivateImportUsage]

from moe_jax.aot.bundles import DELAY_SLOTS, Schedule
from moe_jax.aot.jaxprs import compile_alone, equations
from moe_jax.aot.scalar_unit import Execution, execute
from moe_jax.aot.targets import TpuTarget

_KERNEL_PRIMITIVE = "pallas_call"
_INLINED = (
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vmap_call",
    "remat2",
    "checkpoint",
)
"""Primitives whose jaxpr takes what they take."""


@dataclasses.dataclass(frozen=True, eq=False)
class TpuKernelCall:
    """One call of a kernel in a program."""

    equation: JaxprEqn
    scalars: Mapping[int, Any]
    """Values of its integer operands, by position, as far as they are known before the program runs."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.equation.params["name"] or self.equation.params["jaxpr"].debug_info.func_name

    @property
    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of its operands; the bounds of a dynamic grid come first."""
        return tuple(_array(variable) for variable in self.equation.invars)

    @property
    def results(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what it returns."""
        return tuple(_array(variable) for variable in self.equation.outvars)

    def arrays(self) -> str:
        """What it computes with, tables aside: `[65536,2048] [128,2,768,2048] -> [65536,768]`."""
        operands = [array for array in self.operands if len(array.shape) > 1]
        sides = [" ".join(str(list(a.shape)).replace(" ", "") for a in side) for side in (operands, self.results)]
        return " -> ".join(sides)

    def sameness(self) -> str:
        """Equal for calls whose compiled code is the same."""
        shapes = [(array.shape, str(array.dtype)) for array in (*self.operands, *self.results)]
        params = self.equation.params
        return f"{self.name} {shapes} {params['jaxpr']} {params['grid_mapping']} {params['compiler_params']}"

    def vmem_bytes(self) -> int:
        """Vector memory of its blocks, twice each as the grid's pipeline has them, and of its scratch buffers."""
        mapping = self.equation.params["grid_mapping"]
        blocks = [block.transformed_block_aval for block in mapping.block_mappings]
        scratch = (
            self.equation.params["jaxpr"].invars[-mapping.num_scratch_operands :]
            if mapping.num_scratch_operands
            else ()
        )
        return sum(2 * _vmem_bytes(block) for block in blocks) + sum(_vmem_bytes(buffer.aval) for buffer in scratch)

    def compile_alone(self, target: TpuTarget) -> None:
        """Compile the kernel for `target`; whatever the compiler raises tells why it cannot be, vector memory included."""
        compile_alone(self.equation, target)

    def schedule_alone(self, target: TpuTarget, dumps: Path) -> Schedule:
        """Compile the kernel for `target`, and read and delete what its compiler wrote into `dumps`.

        Args:
            target: what to compile for.
            dumps: the folder that `LIBTPU_INIT_ARGS` named when libtpu was loaded; all it holds is deleted.
        """
        try:
            self.compile_alone(target)
            return Schedule.read(dumps, DELAY_SLOTS[target.device.name])
        finally:
            for file in dumps.glob("*"):
                file.unlink()

    def with_vmem_limit(self, limit_bytes: int) -> "TpuKernelCall":
        """The same call, whose kernel may use that much vector memory."""
        compiler_params = dataclasses.replace(self.equation.params["compiler_params"], vmem_limit_bytes=limit_bytes)
        params = {**self.equation.params, "compiler_params": compiler_params}
        return dataclasses.replace(self, equation=self.equation.replace(params=params))

    def execute(self, schedule: Schedule, *, core: int = 0) -> Execution:
        """What the compiled kernel executes, given the scalars of this call."""
        return execute(schedule, self.scalars, core=core)


def tpu_kernel_calls(program: ClosedJaxpr, known: Mapping[int, Any]) -> tuple[TpuKernelCall, ...]:
    """The calls of Pallas TPU kernels in a program, in their order, and the scalars that they get.

    Whatever depends on known arguments alone is computed; the rest of the program is not. What a loop calls is listed once for
    each of its turns.

    Args:
        program: a traced function.
        known: values of some of its arguments, by position: group sizes, or ids of chosen experts.

    Raises:
        ValueError: a kernel is called in a condition, or in a loop of which the number of turns is not known.
    """
    calls: list[TpuKernelCall] = []
    _walk(program, [known.get(position) for position in range(len(program.jaxpr.invars))], calls)
    return tuple(calls)


def tpu_kernels(program: ClosedJaxpr) -> tuple[TpuKernelCall, ...]:
    """Every call of a Pallas TPU kernel in the text of a program, inside loops and conditions too; nothing is known of scalars."""
    found = equations(program, not_inside=(_KERNEL_PRIMITIVE,))
    return tuple(TpuKernelCall(equation, {}) for equation in found if equation.primitive.name == _KERNEL_PRIMITIVE)


def _walk(program: ClosedJaxpr, arguments: list[Any], calls: list[TpuKernelCall]) -> list[Any]:
    """Values of the results, None if not known."""
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        inputs = [_value_of(variable, values) for variable in equation.invars]
        values.update(zip(equation.outvars, _results(equation, inputs, calls), strict=True))
    return [_value_of(variable, values) for variable in jaxpr.outvars]


def _value_of(variable: Any, values: Mapping[Any, Any]) -> Any:
    return variable.val if isinstance(variable, Literal) else values.get(variable)


def _results(equation: JaxprEqn, inputs: list[Any], calls: list[TpuKernelCall]) -> list[Any]:
    name = equation.primitive.name
    if name == _KERNEL_PRIMITIVE:
        scalars = {position: _scalar(value) for position, value in enumerate(inputs) if _is_table(value)}
        calls.append(TpuKernelCall(equation, scalars))
        return [None] * len(equation.outvars)
    calls_kernel = any(inner.primitive.name == _KERNEL_PRIMITIVE for inner in equations(list(equation.params.values())))
    if not calls_kernel and all(value is not None for value in inputs):
        outputs = equation.primitive.bind(*inputs, **equation.params)
        return outputs if equation.primitive.multiple_results else [outputs]
    if name in _INLINED:
        inner = next(v for v in equation.params.values() if isinstance(v, (ClosedJaxpr, Jaxpr)))
        return _walk(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), inputs, calls)
    if not calls_kernel:
        return [None] * len(equation.outvars)
    if name != "while":
        raise ValueError(f"a kernel is called in {name}")
    return _results_of_loop(equation.params, inputs, calls)


def _results_of_loop(params: Mapping[str, Any], inputs: list[Any], calls: list[TpuKernelCall]) -> list[Any]:
    num_condition, num_body = params["cond_nconsts"], params["body_nconsts"]
    for_condition, for_body = inputs[:num_condition], inputs[num_condition : num_condition + num_body]
    carried = inputs[num_condition + num_body :]
    while True:
        (goes_on,) = _walk(params["cond_jaxpr"], [*for_condition, *carried], [])
        if goes_on is None:
            raise ValueError("a kernel is called in a loop of which the number of turns is not known")
        if not goes_on:
            return carried
        carried = _walk(params["body_jaxpr"], [*for_body, *carried], calls)


def _is_table(value: Any) -> bool:
    return value is not None and jnp.issubdtype(jnp.result_type(value), jnp.integer)


def _scalar(value: Any) -> Any:
    array = np.asarray(value)
    return int(array.reshape(())) if array.size == 1 else array.reshape(-1).tolist()


def _vmem_bytes(aval: Any) -> int:
    space = str(getattr(aval, "memory_space", "")).lower()
    if "vmem" not in space and "default" not in space and space != "none":
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def _array(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)
