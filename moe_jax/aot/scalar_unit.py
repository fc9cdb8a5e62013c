"""What a compiled TPU kernel executes for given group sizes, without a TPU: its scalar instructions, carried out.

Branches, loops, and the sizes of copies depend on scalars only: on the tables that a kernel has prefetched, and on what it
computes from them. So carrying these instructions out tells exactly which bundles are executed how often, and what is copied
to and from device memory. It tells no time: how long a bundle waits for a copy is not known.
"""

import collections
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from moe_jax.aot.bundles import Instruction, Schedule

GRANULE_BYTES = 32
"""Unit in which the sizes of copies are given."""
_ADDRESS_BITS = 24
_FIRST_OPERAND_BIT, _OPERAND_BITS = 64, 8
"""Operand i has the address 2**(64 + 8 i), from which i can be told even after it was shifted a little or an offset was added."""
_MASK = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, eq=False)
class Execution:
    """What a kernel executed."""

    schedule: Schedule
    times: Int[np.ndarray, "bundles"]
    """How often each bundle was."""
    read_bytes: Mapping[int, int]
    """What was copied from device memory, by the position of the kernel's operand."""
    written_bytes: Mapping[int, int]
    """What was copied to device memory, by the position of the operand or result."""

    def __add__(self, other: "Execution") -> "Execution":
        """This one, then another one of the same kernel."""
        return Execution(
            self.schedule,
            self.times + other.times,
            collections.Counter(self.read_bytes) + collections.Counter(other.read_bytes),
            collections.Counter(self.written_bytes) + collections.Counter(other.written_bytes),
        )

    @property
    def bundles(self) -> int:
        """How many were executed."""
        return int(self.times.sum())

    def slots(self, unit: str) -> int:
        """How many slots of a unit were filled in all of them."""
        return int(self.times @ self.schedule.column(unit))

    @property
    def matmul_occupancy(self) -> float:
        """Share of matmul slots that were filled in bundles between the first and the last with a matmul of a basic block."""
        bundles = int(self.times @ self.schedule.within_matmuls)
        available = bundles * self.schedule.slots_per_bundle("MATMUL")
        return self.slots("MATMUL") / available if available else 0.0


def execute(
    schedule: Schedule, operands: Mapping[int, Sequence[int] | int], *, core: int = 0, most_bundles: int = 10**10
) -> Execution:
    """Carry out the scalar instructions of a kernel.

    Args:
        schedule: the kernel.
        operands: values of those operands that are scalars or are copied to scalar memory, by position. The bounds of a
            dynamic grid come first.
        core: which core of a device of several executes it.
        most_bundles: after how many the kernel is given up.

    Raises:
        ValueError: what is executed depends on a value that is not known, or an instruction is not known.
        RuntimeError: the kernel does not end.
    """
    return _Unit(schedule, operands, core).run(most_bundles)


class _Unit:
    """Registers and scalar memory. A value that is not known (it came from vectors, or from semaphores) is None."""

    def __init__(self, schedule: Schedule, operands: Mapping[int, Sequence[int] | int], core: int) -> None:
        self._schedule, self._given, self._core = schedule, operands, core
        self._registers: dict[str, int | None] = {}
        self._written_at: dict[str, int] = {}
        self._memory: dict[int | None, int | None] = {}
        self._divided: dict[str, collections.deque[int | None]] = collections.defaultdict(collections.deque)
        """Results that were not fetched yet, by the name of the division."""
        self._clock = 0
        self._read: collections.Counter[int] = collections.Counter()
        self._written: collections.Counter[int] = collections.Counter()

    def run(self, most_bundles: int) -> Execution:
        schedule = self._schedule
        changes = np.zeros(len(schedule) + 1, np.int64)
        addresses = sorted(schedule.instructions)
        following = np.searchsorted(addresses, np.arange(len(schedule) + 1))
        begin, executed = 0, 0
        jump: tuple[int, int] | None = None  # the address after the slots of a branch that is taken, and its target
        position = 0
        while True:
            address = addresses[position] if position < len(addresses) else len(schedule)
            if jump is not None and address >= jump[0]:
                changes[begin] += 1
                changes[jump[0]] -= 1
                executed += jump[0] - begin
                if executed > most_bundles:
                    raise RuntimeError(f"the kernel did not end after {most_bundles} bundles")
                begin, jump = jump[1], None
                position = following[begin]
                continue
            if address == len(schedule):
                break
            for instruction in schedule.instructions[address]:
                target = self._carry_out(instruction)
                if target is not None:
                    jump = (schedule.after_branch(address), target)
            position += 1
        changes[begin] += 1
        changes[len(schedule)] -= 1
        return Execution(schedule, np.cumsum(changes[:-1]), dict(self._read), dict(self._written))

    def _carry_out(self, instruction: Instruction) -> int | None:
        """Returns the target of a branch that is taken."""
        operation, result = instruction.operation, instruction.result
        self._clock += 1
        if instruction.predicate is not None:
            name, wanted = instruction.predicate
            value = self._registers.get(name)
            matters = operation in ("copy", "spop.drf") or operation.startswith(("sbr", "sdivrem"))
            if value is None and matters:
                raise ValueError(f"what is executed depends on {name}, which is not known: {instruction}")
            if value is None and operation == "sst":
                self._memory[self._address(instruction.operands[0])] = None
                return None
            if value is None:
                return self._write(result, None)
            if bool(value) != wanted:
                return (
                    None if instruction.otherwise is None else self._write(result, self._value(instruction.otherwise))
                )
        if operation.startswith("sbr"):
            return self._schedule.targets[instruction.operands[0]]
        if operation == "operand":
            return self._write(result, self._operand(*instruction.operands))
        if operation == "core":
            return self._write(result, self._core)
        if operation == "sphi":  # names of one register: its value is what was written last
            names = [name for name in instruction.operands if name in self._written_at]
            return self._write(result, self._registers[max(names, key=self._written_at.__getitem__)])
        if operation == "copy":
            return self._copy(*instruction.operands)
        if operation == "sst":
            self._memory[self._address(instruction.operands[0])] = self._value(instruction.operands[1])
            return None
        if operation == "sld":
            return self._write(result, self._memory.get(self._address(instruction.operands[0])))
        if operation == "sdivrem.u32":
            assert result is not None
            self._divided[result].extend(self._divide(*instruction.operands))
            return None
        if operation == "spop.drf":
            waiting = self._divided[instruction.operands[0]]
            return self._write(result, waiting.popleft() if waiting else None)
        if operation in _UNKNOWN:
            return self._write(result, None)
        if operation not in _OPERATIONS:
            raise ValueError(f"unknown instruction of the scalar unit: {instruction}")
        values = [self._value(operand) for operand in instruction.operands]
        if operation == "scalar_select":
            if values[0] is None:
                return self._write(result, None)
            return self._write(result, values[1] if values[0] else values[2])
        if operation in _DECIDED_BY and _DECIDED_BY[operation] in (
            value if value is None else bool(value) for value in values
        ):
            values = [_DECIDED_BY[operation]] * len(values)
        return self._write(result, None if None in values else _OPERATIONS[operation](*values))

    def _write(self, name: str | None, value: int | None) -> None:
        if name is not None:
            self._registers[name] = value
            self._written_at[name] = self._clock

    def _operand(self, index: str, kind: str) -> int | None:
        """A scalar, or the address of an array in device memory."""
        given = self._given.get(int(index))
        if isinstance(given, int) and kind == "input":
            return given & _MASK
        return 1 << (_FIRST_OPERAND_BIT + _OPERAND_BITS * int(index))

    def _value(self, text: str) -> int | None:
        if text.startswith("%"):
            return self._registers.get(text)
        if text.startswith("[") or "#allocation" in text:
            return self._address(text)
        if text in ("true", "false"):
            return int(text == "true")
        return int(text.removeprefix("$"), 0)

    def _address(self, text: str) -> int | None:
        total: int = 0
        for part in (
            text.removeprefix("[").removeprefix("smem:").replace(" [", "+").replace("[", "").replace("]", "").split("+")
        ):
            allocation = re.fullmatch(r"\s*#allocation(\d+)(_spill)?\s*", part)
            if allocation is None and "#" in part:
                raise ValueError(f"unknown form of an address: {text}")
            value = (int(allocation[1]) + 1) << _ADDRESS_BITS if allocation else self._value(part.strip())
            if value is None:
                return None
            total += value
        return total

    def _divide(self, dividend: str, divisor: str, kind: str) -> tuple[int | None, ...]:
        """The quotient, if it is asked for, and then the remainder, if that is."""
        a, b = self._value(dividend), self._value(divisor)
        results = (None, None) if a is None or not b else divmod(a, b)
        return {"kDiv": results[:1], "kRem": results[1:], "kDivAndRem": results}[kind]

    def _copy(self, source_memory: str, target_memory: str, source: str, size: str, target: str) -> None:
        if target_memory == "smem":
            where, base = self._value(source), self._value(target)
            values = None if where is None else self._given.get(_operand_at(where))
            if values is None or base is None or isinstance(values, int):
                raise ValueError(f"scalars are not given that are copied from {source}, at {where}")
            self._memory.update((base + offset, int(value) & _MASK) for offset, value in enumerate(values))
            return
        granules = self._value(size)
        for memory, where, counter in ((source_memory, source, self._read), (target_memory, target, self._written)):
            if memory in ("hbm", "any"):
                address = self._value(where)
                if granules is None or address is None:
                    raise ValueError(f"size or address of a copy are not known: {size}, {where}")
                if address < 1 << _FIRST_OPERAND_BIT:  # not in device memory
                    continue
                counter[_operand_at(address)] += granules * GRANULE_BYTES


def _operand_at(address: int) -> int:
    """Position of the operand in whose memory an address is."""
    return (address.bit_length() - 1 - _FIRST_OPERAND_BIT) // _OPERAND_BITS


def _signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 and value <= _MASK else value


def _wrapped(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """A function of two words; sums with an address in device memory are not cut to words."""

    def apply(a: int, b: int) -> int:
        if max(a, b) >> _FIRST_OPERAND_BIT:
            return function(_signed(a), _signed(b))
        return function(a, b) & _MASK

    return apply


def _compare(function: Callable[[int, int], bool], *, signed: bool) -> Callable[[int, int], int]:
    return lambda a, b: int(function(_signed(a), _signed(b)) if signed else function(a, b))


def _identity(value: int, *_: int) -> int:
    return value


_UNKNOWN = frozenset({"spop", "spop.sfrf"})
_DECIDED_BY = {"por": True, "pnor": True, "pand": False, "pnand": False}
"""What one operand has to be for the result not to depend on the other, which need not be known then."""
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "scalar_select": _identity,
    "smov.u32": _identity,
    "int_to_ptr.vmem": _identity,
    "int_to_ptr.hbm": _identity,
    "int_to_ptr.smem": _identity,
    "int_to_ptr.sflag": _identity,
    "sadd.s32": _wrapped(operator.add),
    "ssub.s32": _wrapped(operator.sub),
    "smul.u32": _wrapped(operator.mul),
    "smul.s32": _wrapped(operator.mul),
    "smulhi.u32": lambda a, b: a * b >> 32,
    "sand.u32": _wrapped(operator.and_),
    "sor.u32": _wrapped(operator.or_),
    "sxor.u32": _wrapped(operator.xor),
    "sshll.u32": _wrapped(lambda a, b: a << (b & 31)),
    "sshrl.u32": _wrapped(lambda a, b: a >> (b & 31)),
    "sshra.s32": _wrapped(lambda a, b: _signed(a) >> (b & 31)),
    "smin.u32": min,
    "smax.u32": max,
    "smin.s32": _wrapped(lambda a, b: min(_signed(a), _signed(b))),
    "smax.s32": _wrapped(lambda a, b: max(_signed(a), _signed(b))),
    "por": lambda a, b: int(bool(a) or bool(b)),
    "pand": lambda a, b: int(bool(a) and bool(b)),
    "pnand": lambda a, b: int(not (a and b)),
    "pnor": lambda a, b: int(not (a or b)),
    "pxor": lambda a, b: int(bool(a) != bool(b)),
    "pneg": lambda a: int(not a),
    "pmov": _identity,
    **{f"scalar_lea.{memory}": _wrapped(operator.add) for memory in ("vmem", "smem", "hbm", "sflag")},
    **{
        f"scmp.{name}.{kind}.totalorder": _compare(getattr(operator, name), signed=kind == "s32")
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("s32", "u32")
    },
}
