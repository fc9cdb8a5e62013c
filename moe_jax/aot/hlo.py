"""Reads the text of a compiled program (`jax.stages.Compiled.as_text()`): its computations and instructions.

Only what the readers of this package need: names, types, operands, attributes, and who calls whom how often. Text of GPU,
TPU and CPU programs differs in layouts and in what operands carry; both forms are read.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_BITS = re.compile(r"[a-z]+(\d+)")
_TUPLE_INDEX = re.compile(r"\bindex=(\d+)")
_UNSIZED = ("token", "opaque")
_COPIES = ("copy", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    """Without the percent sign."""
    opcode: str
    """As in "all-reduce-start"."""
    type: str
    """Its result, an array or a tuple, as it is written."""
    operands: tuple[str, ...]
    """Names of the instructions that it reads, in order."""
    arguments: str
    """What stands between the parentheses."""
    attributes: str
    """What follows them."""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it refers to."""
        names = _CALLED.findall(self.attributes)
        for listed in _CALLED_LIST.findall(self.attributes):
            names += [name.strip().removeprefix("%") for name in listed.split(",") if name.strip()]
        return tuple(names)

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced function; empty if that isn't known."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str | None:
        """The computation that the attribute of this name refers to."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program; its instructions stand in the order in which they are scheduled."""

    name: str
    is_entry: bool
    instructions: tuple[Instruction, ...]

    def by_name(self) -> dict[str, Instruction]:
        """Its instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}


@dataclasses.dataclass(frozen=True)
class Visits:
    """How often a computation runs while the program runs once."""

    times: int
    """Product of the trip counts of the loops around it, as far as these are known."""
    open_loops: tuple[str, ...] = ()
    """`op_name` of the loops around it that end when the data says so; `times` counts one iteration of each."""


def array_bytes(element_type: str, dimensions: str) -> int:
    """Bytes of an array such as `bf16`, `4,128`, without the padding of its layout."""
    if element_type in _UNSIZED:
        return 0
    bits = 8 if element_type == "pred" else int(_BITS.match(element_type).group(1))  # pyright: ignore[reportOptionalMemberAccess]
    sizes = [int(size.strip().removeprefix("<=")) for size in dimensions.split(",") if size.strip()]
    return -(-math.prod(sizes) * bits // 8)


def type_bytes(text: str) -> int:
    """Bytes of all arrays that a type (of one array or a tuple) names."""
    return sum(array_bytes(*found) for found in _ARRAY.findall(_without_layouts(text)))


def short_type(text: str) -> str:
    """The type without layouts: `bf16[4,128]`."""
    arrays = [f"{element}[{sizes}]" for element, sizes in _ARRAY.findall(_without_layouts(text))]
    return arrays[0] if len(arrays) == 1 else f"({', '.join(arrays)})"


def read_computations(text: str) -> dict[str, Computation]:
    """Computations of a compiled program by name.

    Args:
        text: what `jax.stages.Compiled.as_text()` returns.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    name, is_entry, instructions = None, False, []
    for line in text.splitlines():
        if name is None:
            if header := _COMPUTATION.match(line):
                name, is_entry, instructions = header.group(2), bool(header.group(1)), []
        elif line.startswith("}"):
            computations[name] = Computation(name, is_entry, tuple(instructions))
            name = None
        elif instruction := _instruction(line):
            instructions.append(instruction)
    if not any(computation.is_entry for computation in computations.values()):
        raise ValueError(f"the text of a compiled program has an ENTRY computation, got none in {len(text)} characters")
    return computations


def count_visits(computations: Mapping[str, Computation]) -> dict[str, tuple[Visits, ...]]:
    """How often each computation runs, one entry per call to it; a branch that may be taken counts as taken."""
    loops = Loops(computations)
    entry = next(computation for computation in computations.values() if computation.is_entry)
    visits: dict[str, list[Visits]] = {}
    waiting = [(entry.name, Visits(1))]
    while waiting:
        name, around = waiting.pop()
        visits.setdefault(name, []).append(around)
        for instruction in computations[name].instructions:
            inside = around
            if instruction.opcode == "while":
                trips = loops.trip_count(name, instruction)
                if trips is None:
                    inside = Visits(around.times, (*around.open_loops, instruction.op_name))
                else:
                    inside = Visits(around.times * trips, around.open_loops)
            waiting += [(called, inside) for called in instruction.called if called in computations]
    return {name: tuple(found) for name, found in visits.items()}


class Loops:
    """The `while` loops of a program, and how often they turn.

    GPU programs carry a `known_trip_count`. In other programs, the loops that `jax.lax.scan` makes are known by a counter that
    starts at a constant, grows by one, and is compared with a constant; constants may come from outside, carried unchanged
    through the loops around.
    """

    def __init__(self, computations: Mapping[str, Computation]):
        """Index the loops of `computations`."""
        self._instructions = {name: computation.by_name() for name, computation in computations.items()}
        self._roots = {name: computation.instructions[-1] for name, computation in computations.items()}
        self._loop_of_body = {
            instruction.attribute("body"): (name, instruction)
            for name, computation in computations.items()
            for instruction in computation.instructions
            if instruction.opcode == "while"
        }

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """How often the body of a `while` in `computation` runs; None if the program doesn't say."""
        if known := _KNOWN_TRIP_COUNT.search(loop.attributes):
            return int(known.group(1))
        condition, body = loop.attribute("condition"), loop.attribute("body")
        if condition is None or body is None:
            return None
        compared = self._roots[condition]
        if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
            return None
        counter, limit = (self._instructions[condition][name] for name in compared.operands)
        index = _tuple_index(counter)
        if index is None or not self._grows_by_one(body, index):
            return None
        start = self._carried_in(computation, loop, index)
        limit_index = _tuple_index(limit)
        if limit_index is None:
            end = _constant(limit)
        else:
            end = self._carried_in(computation, loop, limit_index) if self._is_unchanged(body, limit_index) else None
        return None if start is None or end is None else max(0, end - start)

    def _carried_in(self, computation: str, loop: Instruction, index: int) -> int | None:
        """The constant with which element `index` of a loop's tuple begins."""
        return self._value(computation, self._element(computation, loop.operands[0], index))

    def _value(self, computation: str, instruction: Instruction | None) -> int | None:
        """The constant that an instruction of `computation` is, or that the loops around carry to it unchanged."""
        if instruction is None:
            return None
        index = _tuple_index(instruction)
        if index is None:
            return _constant(instruction)
        carrier = self._instructions[computation][instruction.operands[0]]
        if carrier.opcode != "parameter" or computation not in self._loop_of_body:
            return None
        outside, loop = self._loop_of_body[computation]
        return self._carried_in(outside, loop, index) if self._is_unchanged(computation, index) else None

    def _source(self, computation: str, name: str) -> Instruction | None:
        """The instruction of that name, or what it is a copy of."""
        instruction = self._instructions[computation].get(name)
        while instruction is not None and instruction.opcode in _COPIES:
            instruction = self._instructions[computation].get(instruction.operands[0])
        return instruction

    def _element(self, computation: str, name: str, index: int) -> Instruction | None:
        """What is put into a tuple at `index`."""
        made = self._source(computation, name)
        if made is None or made.opcode != "tuple" or index >= len(made.operands):
            return None
        return self._source(computation, made.operands[index])

    def _is_unchanged(self, body: str, index: int) -> bool:
        """Whether a loop's body hands on element `index` of its tuple as it got it."""
        element = self._element(body, self._roots[body].name, index)
        return element is not None and self._reads_parameter(body, element, index)

    def _reads_parameter(self, computation: str, instruction: Instruction, index: int) -> bool:
        if _tuple_index(instruction) != index:
            return False
        return self._instructions[computation][instruction.operands[0]].opcode == "parameter"

    def _grows_by_one(self, body: str, index: int) -> bool:
        """Whether a loop's body adds 1 to element `index` of its tuple."""
        element = self._element(body, self._roots[body].name, index)
        if element is None or element.opcode != "add":
            return False
        operands = [operand for name in element.operands if (operand := self._source(body, name))]
        reads_counter = any(self._reads_parameter(body, operand, index) for operand in operands)
        return reads_counter and any(self._value(body, operand) == 1 for operand in operands)


def _tuple_index(instruction: Instruction) -> int | None:
    """The element that a `get-tuple-element` reads."""
    if instruction.opcode != "get-tuple-element":
        return None
    found = _TUPLE_INDEX.search(instruction.attributes)
    return int(found.group(1)) if found else None


def _constant(instruction: Instruction) -> int | None:
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
    return int(instruction.arguments) if is_integer else None


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    type_end = _type_end(line, head.end())
    opcode = _OPCODE.match(line, type_end)
    if opcode is None:
        return None
    end = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : end]
    return Instruction(
        name=head.group(2),
        opcode=opcode.group(1),
        type=line[head.end() : type_end],
        operands=tuple(_REFERENCE.findall(arguments)),
        arguments=arguments,
        attributes=line[end + 1 :],
    )


def _type_end(line: str, start: int) -> int:
    """Where the type that begins at `start` ends."""
    if line[start] == "(":
        return _closing(line, start) + 1
    end = line.index("]", start) + 1 if "[" in line[start:] else start
    return _closing(line, end) + 1 if line[end : end + 1] == "{" else end


def _closing(line: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for position in range(start, len(line)):
        if line[position] in "({[":
            depth += 1
        elif line[position] in ")}]":
            depth -= 1
            if depth == 0:
                return position
    raise ValueError(f"unbalanced brackets in {line[start : start + 80]!r}")


def _without_layouts(text: str) -> str:
    return re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", text)
