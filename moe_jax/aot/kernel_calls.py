"""The Mosaic GPU kernels that a traced program calls, and compiling one of them alone."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn  # pyright: ignore[reportPrivateImportUsage]

from moe_jax.aot.jaxprs import compile_alone, equations
from moe_jax.aot.ptxas import KernelReport, dumping_to
from moe_jax.aot.targets import GpuTarget

_KERNEL_PRIMITIVE = "mpmd_map"
"""What `plgpu.kernel` traces to."""
_GLOBAL_MEMORY = re.compile(r"(Ref<gmem>\{\w+)\[([\d,]*)\]")
"""Type of an array in global memory, in the text of a jaxpr."""
_INDEXED = re.compile(r"\((\d+),( \d+)?\), \(\)\)")
"""Shape of an array that is sliced, in the text of an index."""
_ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclasses.dataclass(frozen=True, eq=False)
class KernelCall:
    """One call of a kernel, as it stands in a traced program."""

    equation: JaxprEqn

    @property
    def name(self) -> str:
        """Of the kernel's function."""
        return self.equation.params["name"]

    @property
    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the arrays in global memory that it reads."""
        return tuple(_array(variable) for variable in self.equation.invars)

    @property
    def results(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what it returns."""
        return tuple(_array(variable) for variable in self.equation.outvars)

    def buffers(self) -> tuple[str, ...]:
        """Its buffers in shared memory, with the sizes that tiles and stages give them, as in "bfloat16[4,128,64]"."""
        found = []
        for equation in equations(self.equation.params["jaxprs"]):
            if equation.primitive.name != "run_scoped":
                continue
            transforms = equation.params["ref_transforms"]
            for variable, applied in zip(equation.params["jaxpr"].invars, transforms, strict=False):
                if "<smem>" in str(variable.aval) and "barrier" not in str(variable.aval):
                    found.append(_buffer(variable.aval, applied))
        return tuple(found)

    def sameness(self) -> str:
        """Equal for calls whose compiled code is the same, of one model's: those that differ in numbers of rows only.

        These reach the code in descriptors, which the host fills in. A number of rows is the first size of any array in global
        memory; so is the number of experts, which is one and the same within a model.
        """
        arrays = (*self.operands, *self.results)
        rows = {str(array.shape[0]) for array in arrays if len(array.shape) in (1, 2)}

        def without_rows(match: re.Match[str]) -> str:
            _, *inner = match[2].split(",")
            middle = ["rows" if size in rows else size for size in inner[:-1]]
            return f"{match[1]}[{','.join(('rows', *middle, *inner[-1:]))}]"

        def indexed_without_rows(match: re.Match[str]) -> str:
            return match[0].replace(match[1], "rows", 1) if match[1] in rows else match[0]

        params = {name: value for name, value in self.equation.params.items() if name not in ("jaxprs", "out_avals")}
        text = f"{self.name} {params} {self.equation.params['jaxprs']}"
        text = " ".join(_ADDRESS.sub("", text).split())
        return _INDEXED.sub(indexed_without_rows, _GLOBAL_MEMORY.sub(without_rows, text))

    def compile_alone(self, target: GpuTarget, dump: Path) -> KernelReport:
        """Compile the kernel for `target`, keep what the compilers print in `dump`, and read it.

        Raises:
            ValueError: the compilers did not report. They do so only the first time that a process compiles a kernel.
        """
        with dumping_to(dump):
            compile_alone(self.equation, target)
        return KernelReport.of_dump(dump.read_text())


def kernel_calls(program: ClosedJaxpr) -> tuple[KernelCall, ...]:
    """Every call of a Mosaic GPU kernel in a traced program, also inside loops and conditions, in the order of the text."""
    return tuple(
        KernelCall(equation)
        for equation in equations(program, not_inside=(_KERNEL_PRIMITIVE,))
        if equation.primitive.name == _KERNEL_PRIMITIVE
    )


def _array(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _buffer(aval: Any, transforms: tuple[Any, ...]) -> str:
    """Dtype and shape of a buffer as the kernel's author wrote it: before it was tiled."""
    shape = aval.shape
    for transform in transforms:
        if tiling := getattr(transform, "tiling", None):
            outer, tiles, inner = (
                shape[: -2 * len(tiling)],
                shape[-2 * len(tiling) : -len(tiling)],
                shape[-len(tiling) :],
            )
            shape = (*outer, *map(math.prod, zip(tiles, inner, strict=True)))
    return f"{aval.dtype}[{','.join(map(str, shape))}]"
