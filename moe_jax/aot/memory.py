"""Whether a compiled program fits into a device's memory, and what takes the room."""

import dataclasses
import re
from typing import Any

import jax

_TOO_LARGE = "CompileTimeHbmOom"
"""What the TPU compiler calls a program that needs more than the device memory, and nothing else."""
_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDED_OF_AVAILABLE = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one device's memory that a program takes while it runs."""

    argument_bytes: int
    """Weights, cache and inputs."""
    output_bytes: int
    """Results, those that take the place of arguments left out."""
    temporary_bytes: int
    """Everything between, at its peak."""
    code_bytes: int
    """The program itself."""

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "MemoryUse":
        """As the compiler planned it.

        Raises:
            ValueError: the compiler doesn't plan memory.
        """
        planned: Any = compiled.memory_analysis()
        if planned is None:
            raise ValueError("the compiler has no plan of the program's memory")
        return cls(
            argument_bytes=planned.argument_size_in_bytes,
            output_bytes=planned.output_size_in_bytes - planned.alias_size_in_bytes,
            temporary_bytes=planned.temp_size_in_bytes,
            code_bytes=planned.generated_code_size_in_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """A compiler's refusal: the program doesn't fit into a device's memory."""

    needed_bytes: int | None
    """What the program would take; None if the compiler doesn't say."""
    available_bytes: int | None
    """What the compiler has for programs; None if it doesn't say."""


def refusal(error: Exception) -> OutOfMemory | None:
    """What the TPU compiler says about a program that is too large for the device memory; None for any other error."""
    text = str(error)
    if _TOO_LARGE not in text:
        return None
    found = next((match for form in _NEEDED_OF_AVAILABLE if (match := form.search(text))), None)
    if found is None:
        return OutOfMemory(needed_bytes=None, available_bytes=None)
    needed, needed_unit, available, available_unit = found.groups()
    return OutOfMemory(
        needed_bytes=round(float(needed) * _UNITS[needed_unit]),
        available_bytes=round(float(available) * _UNITS[available_unit]),
    )
