"""A TPU kernel as its compiler scheduled it: bundles of instructions, read from the compiler's dumps.

A TPU core issues one bundle after the other; each has slots for several units. With the flags of `dump_flags` the compiler
writes, for each kernel, its final bundles as text and a table of the slots that each bundle fills. Only what the scalar unit
does is kept of the text: it computes addresses and conditions, branches, and starts copies, so what a kernel does with given
group sizes follows from it alone (`scalar_unit.py`).
"""

import bisect
import dataclasses
import functools
import itertools
import re
from pathlib import Path

import numpy as np
from jaxtyping import Int

DELAY_SLOTS = {"v5e": 4, "v5p": 4, "v6e": 4, "7x": 6}
"""How many bundles after a branch are executed before it is taken, by generation: seen where the bundles that follow a branch are
executed on its other condition only, which is so many of them."""
DUMP_VARIABLE = "LIBTPU_INIT_ARGS"
"""Environment variable that is read when libtpu is loaded: by the first program that is compiled in a process."""

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +([A-Z]{2})? *: ?[> ]*\{", re.MULTILINE)
_INSTRUCTION = re.compile(r"(?:(%\w+) = |\d+ = )?([A-Za-z_][\w.]*)\s*(.*)", re.DOTALL)
_PREDICATE = re.compile(r"\((!?)(%p\w+)(?:, (%\w+))?\),?\s*")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_REGION_END = re.compile(r"End region (\d+)")
_SIZE = re.compile(r"/\*size_in_granules=\*/([^,\s]+)")
_DIRECTION = re.compile(r"/\* (\w+)-to-(\w+)")
_DIVISION = re.compile(r"/\* (kDiv|kRem|kDivAndRem) \*/")
_UNPARSED = re.compile(r"\[(?:resolvable|thread):[^\]]*\]\s*")
_OPERAND_INDEX = re.compile(r"index: (\d+), kind: (\w+)")


def dump_flags(folder: Path) -> str:
    """What `LIBTPU_INIT_ARGS` must hold before libtpu is loaded, so that `Schedule.read` finds its files in `folder`."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of the scalar unit."""

    operation: str
    """Such as "sadd.s32", or "copy" for every kind of direct memory access."""
    result: str | None
    """Name of the register that is written: each write has a name of its own."""
    operands: tuple[str, ...]
    predicate: tuple[str, bool] | None = None
    """A predicate register and the value with which the instruction is executed; None: always."""
    otherwise: str | None = None
    """What the result is if the instruction is not executed; None: what it was."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The bundles of one kernel."""

    instructions: dict[int, tuple[Instruction, ...]]
    """Of the scalar unit, by the address of their bundle; bundles without one are left out."""
    targets: dict[str, int]
    """Address that a branch to a region leads to."""
    block_starts: tuple[int, ...]
    """Addresses that control can come to other than from the bundle before."""
    delay_slots: int
    """How many bundles after a branch are executed before it is taken; fewer where control can come to one of them from elsewhere,
    since an empty bundle may stand for several."""
    slots: Int[np.ndarray, "bundles units"]
    """How many slots of each unit are filled."""
    units: tuple[str, ...]
    capacity: Int[np.ndarray, "units"]
    """How many slots a bundle has of each unit."""

    @classmethod
    def read(cls, folder: Path, delay_slots: int) -> "Schedule":
        """From the dumps of one program that has one kernel, which lie in `folder`.

        Args:
            folder: see `dump_flags`.
            delay_slots: of the generation.

        Raises:
            FileNotFoundError: there are no such dumps.
            ValueError: there is more than one kernel.
        """
        files = [file for file in folder.glob("*-final_bundles.txt") if "-custom-call-" in _opcode(file)]
        if not files:
            raise FileNotFoundError(
                f"no dump of a kernel in {folder}; {DUMP_VARIABLE} must be set before libtpu is loaded"
            )
        if len(files) > 1:
            raise ValueError(f"one kernel expected, found {sorted(file.name for file in files)}")
        prefix = re.sub(r"-\d+-final_bundles\.txt$", "", files[0].name)
        (utilization,) = folder.glob(f"{_escaped(prefix)}-*-final_hlo-static-per-bundle-utilization.txt")
        return cls.parse(files[0].read_text(), utilization.read_text(), delay_slots)

    @classmethod
    def parse(cls, bundles: str, utilization: str, delay_slots: int) -> "Schedule":
        """From the text of the final bundles, and of the slots that each fills.

        Args:
            bundles: the text.
            utilization: the table.
            delay_slots: of the generation.

        Raises:
            ValueError: the texts are not of the same bundles, or not of the form that is known.
        """
        units, capacity, slots = _parse_utilization(utilization)
        starts = list(_BUNDLE.finditer(bundles))
        if [int(start[1], 16) for start in starts] != list(range(len(slots))):
            raise ValueError(f"{len(starts)} bundles, not numbered from 0, with slots for {len(slots)}")
        instructions, targets, after, marks = {}, {}, {}, []
        for address, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
            text = bundles[start.end() : end.start() if end else len(bundles)]
            for region in _REGION.findall(text):
                targets.setdefault(f"$region{region}", address)
            for region in _REGION_END.findall(text):  # of an empty region only the end of the one before it is marked
                after.setdefault(f"$region{int(region) + 1}", address + 1)
            if start[2]:
                marks.append(address)
            found = [i for part in text.split(";;") if (i := _parse_instruction(part)) is not None]
            if found:  # other instructions of the bundle see the names that registers have from here on
                instructions[address] = tuple(sorted(found, key=lambda i: i.operation != "sphi"))
        targets = after | targets
        return cls(instructions, targets, tuple(marks), delay_slots, slots, units, capacity)

    def __len__(self) -> int:
        return len(self.slots)

    def after_branch(self, address: int) -> int:
        """Where bundles end that are executed after the branch at `address`, taken or not."""
        next_start = bisect.bisect(self.block_starts, address)
        end = self.block_starts[next_start] if next_start < len(self.block_starts) else len(self)
        return min(address + self.delay_slots + 1, end)

    @property
    def cores(self) -> int:
        """Over how many cores the kernel splits its work: two if it asks which one it runs on."""
        asks = any(i.operation == "core" for found in self.instructions.values() for i in found)
        return 2 if asks else 1

    def column(self, unit: str) -> Int[np.ndarray, "bundles"]:
        """Filled slots of one unit, by bundle."""
        return self.slots[:, self.units.index(unit)]

    def slots_per_bundle(self, unit: str) -> int:
        """Capacity of one unit."""
        return int(self.capacity[self.units.index(unit)])

    @functools.cached_property
    def within_matmuls(self) -> np.ndarray:
        """Whether each bundle lies between the first and the last one with a matmul of its basic block, both included."""
        matmuls = self.column("MATMUL") > 0
        branches = (
            self.after_branch(address)
            for address, found in self.instructions.items()
            if any(i.operation.startswith("sbr") for i in found)
        )
        borders = sorted({0, len(self), *self.block_starts, *branches})
        within = np.zeros(len(self), bool)
        for begin, end in itertools.pairwise(borders):
            (busy,) = np.nonzero(matmuls[begin:end])
            if busy.size:
                within[begin + busy[0] : begin + busy[-1] + 1] = True
        return within


def _opcode(bundles: Path) -> str:
    """What the text says of the instruction that was compiled, between hyphens."""
    if "schedule-analysis" in bundles.name:
        return ""
    with bundles.open("rb") as opened:
        opened.seek(max(0, bundles.stat().st_size - 100_000))
        end = opened.read().decode(errors="replace")
    entry = re.search(r"exit bundle: %[\w.-]+ = ([\w-]+)\(", end)
    return f"-{entry[1]}-" if entry else ""


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _parse_utilization(text: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    lines = text.splitlines()
    heading = next((number for number, line in enumerate(lines) if line.startswith("MATMUL,")), None)
    if heading is None:
        raise ValueError("the table of filled slots has no heading that begins with MATMUL")
    units = tuple(name.strip() for name in lines[heading].split(","))
    capacity = np.array(lines[heading + 1].split(), int)
    rows = [line.split() for line in lines[heading + 2 :] if line[:1].isdigit()]
    return units, capacity, np.array(rows, int).reshape(-1, len(units))


def _parse_instruction(text: str) -> Instruction | None:
    """One instruction, or None if it is of no consequence for what is executed."""
    plain = _COMMENT.sub("", text).strip().rstrip("}").strip()
    match = _INSTRUCTION.match(plain)
    if match is None:
        return None
    result, operation, rest = match.groups()
    if operation.startswith("inlined_call_operand"):
        place = _OPERAND_INDEX.search(rest)
        if place is None:
            raise ValueError(f"unknown form of an operand: {text}")
        index, kind = place.groups()
        return Instruction("operand", result, (index, kind))
    is_copy = operation.startswith("dma.") and not operation.startswith("dma.done")
    is_scalar = result is not None and (result[1] in "sp" or operation.startswith("sdivrem"))
    if not (is_copy or is_scalar or operation == "sst" or operation.startswith("sbr")):
        return None
    rest = _UNPARSED.sub("", rest)
    predicate = otherwise = None
    if guard := _PREDICATE.search(rest):  # before or after the operands
        predicate, otherwise = (guard[2], not guard[1]), guard[3]
        rest = rest[: guard.start()] + rest[guard.end() :]
    if operation == "sst":
        rest = rest.replace("]] %", "]], %")
    operands = tuple(part.strip() for part in rest.split(",") if part.strip())
    if is_copy:
        size = _SIZE.search(text)
        if size is None:
            raise ValueError(f"a copy without a size: {plain}")
        return Instruction("copy", result, (*_direction(operation, text), operands[0], size[1], operands[2]), predicate)
    if "core id" in text:
        return Instruction("core", result, ())
    if operation.startswith("sdivrem"):
        kind = _DIVISION.search(text)
        if kind is None:
            raise ValueError(f"a division of unknown kind: {text}")
        operands = (*operands, kind[1])
    if operation.startswith("sbr"):
        operands = (rest.split("=")[1].strip(),)
    return Instruction(operation, result, operands, predicate, otherwise)


def _direction(operation: str, text: str) -> tuple[str, str]:
    """Memories that a copy reads and writes; "any" if only the addresses tell."""
    if named := re.fullmatch(r"dma\.(\w+?)_to_(\w+)", operation):
        return named[1], named[2]
    if described := _DIRECTION.search(text):
        return described[1], described[2]
    if operation == "dma.general":
        return "any", "any"
    raise ValueError(f"a copy from and to unknown memories: {' '.join(text.split())}")
