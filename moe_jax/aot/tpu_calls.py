"""The Pallas TPU kernels that a program calls, with the scalars that it gives them; compiling one of them alone."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun  # pyright: ignore[reportPrivateImportUsage]

from moe_jax.aot.bundles import DELAY_SLOTS, Schedule
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
        variables = tuple(dict.fromkeys(v for v in self.equation.invars if not isinstance(v, Literal)))
        alone = Jaxpr(
            constvars=(),
            invars=variables,
            outvars=self.equation.outvars,
            eqns=(self.equation,),
            effects=self.equation.effects,
        )
        sharding = target.one_device()
        avals: list[Any] = [variable.aval for variable in variables]
        arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in avals]
        with target.lowering():
            jax.jit(jaxpr_as_fun(ClosedJaxpr(alone, ()))).lower(*arguments).compile()

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

    Whatever depends on known arguments alone is computed; the rest of the program is not.

    Args:
        program: a traced function.
        known: values of some of its arguments, by position: group sizes, or ids of chosen experts.

    Raises:
        ValueError: a kernel is called in a loop or a condition.
    """
    equations: list[JaxprEqn] = []

    @jax.jit
    def tables(known: Mapping[int, Any]) -> list[dict[int, Any]]:
        calls: list[tuple[JaxprEqn, dict[int, Any]]] = []
        _walk(program, [known.get(position) for position in range(len(program.jaxpr.invars))], calls)
        equations.extend(equation for equation, _ in calls)
        return [scalars for _, scalars in calls]

    found = jax.device_get(tables(dict(known)))
    return tuple(
        TpuKernelCall(equation, {position: _scalar(value) for position, value in scalars.items()})
        for equation, scalars in zip(equations, found, strict=True)
    )


def _walk(program: ClosedJaxpr, arguments: list[Any], calls: list[tuple[JaxprEqn, dict[int, Any]]]) -> list[Any]:
    """Values of the results, None if not known."""
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def value_of(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values.get(variable)

    for equation in jaxpr.eqns:
        inputs = [value_of(variable) for variable in equation.invars]
        name = equation.primitive.name
        if name == _KERNEL_PRIMITIVE:
            calls.append((equation, {i: value for i, value in enumerate(inputs) if _is_table(value)}))
            outputs = [None] * len(equation.outvars)
        elif name in _INLINED:
            inner = next(v for v in equation.params.values() if isinstance(v, (ClosedJaxpr, Jaxpr)))
            outputs = _walk(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), inputs, calls)
        elif any(value is None for value in inputs):
            if _calls_kernel(equation):
                raise ValueError(f"a kernel is called in {name}, of which not all operands are known")
            outputs = [None] * len(equation.outvars)
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [value_of(variable) for variable in jaxpr.outvars]


def _calls_kernel(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_calls_kernel, value))
    if isinstance(value, (Jaxpr, ClosedJaxpr)):
        return any(map(_calls_kernel, value.eqns))
    if isinstance(value, JaxprEqn):
        return value.primitive.name == _KERNEL_PRIMITIVE or any(map(_calls_kernel, value.params.values()))
    return False


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
