"""Which collectives a compiled program executes: how often, over which devices, how many bytes, and beside what.

Read from the program's text, so it is what the compiler made of the model, not what the model asked for: operations that it
merged, rewrote or dropped appear as they will run. Byte counts are those of one device, without the padding of layouts.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.aot.hlo import (
    Computation,
    Instruction,
    Visits,
    count_visits,
    read_computations,
    short_type,
    type_bytes,
)

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Operations that move data between devices."""

COMPUTING = ("fusion", "dot", "convolution", "custom-call", "while", "call", "conditional", "sort", "scatter", "reduce")
"""Instructions that keep a device busy; what only moves or renames data is not one."""

_GROUP_LIST = re.compile(r"replica_groups=\{(\{[^=]*?\})\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_DEVICE_ORDER = r"\[[\d,]+\](?:T\([\d,]+\))?|[\d,\s]+"
_GROUP_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(({_DEVICE_ORDER})\))?\s*\{{([^}}]*)\}}")
_MESH_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    """One of `KINDS`."""
    name: str
    """What the program calls it."""
    computation: str
    """The computation in which it stands."""
    operand_types: tuple[str, ...]
    """Types of what one device gives, as in "bf16[4,128]"."""
    operand_bytes: int
    """Bytes of what one device gives, each time."""
    result_bytes: int
    """Bytes of what one device gets, each time."""
    groups: tuple[tuple[int, ...], ...]
    """Devices that take part together, by their position in the program's device order; of a permute, each pair. Empty: all
    devices form one group."""
    group_size: int
    """How many devices take part together; of a permute 2."""
    executions: int
    """How often it runs when the program runs once, in which loops that end when the data says so turn once."""
    open_loops: int
    """How many such loops are around it."""
    is_async: bool
    """It is started and awaited by two instructions, between which others run."""
    meanwhile: tuple[str, ...]
    """Names of the computing instructions (see `COMPUTING`) that are scheduled between start and end."""
    op_name: str
    """Where it comes from in the traced function."""
    forwards: str | None = None
    """The kind of the collective whose result it hands on as it is; None if what it gives was computed."""

    @property
    def total_operand_bytes(self) -> int:
        """Bytes of what one device gives in one run of the program."""
        return self.operand_bytes * self.executions

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device has to send, each time, when data takes the way that needs least of it.

        Of a `ragged-all-to-all` the sizes are data; counted is the whole operand, which bounds them.
        """
        others = (self.group_size - 1) / self.group_size
        match self.kind:
            case "all-reduce":
                return 2 * others * self.operand_bytes
            case "all-gather":
                return others * self.result_bytes
            case "reduce-scatter" | "all-to-all":
                return others * self.operand_bytes
            case _:
                return self.operand_bytes if self.group_size > 1 else 0

    def crosses(self, devices_per_host: int) -> bool:
        """Whether devices of different hosts take part together, if each host has as many consecutive positions."""
        if not self.groups:
            return self.group_size > devices_per_host
        return any(len({position // devices_per_host for position in group}) > 1 for group in self.groups)


def read_collectives(text: str, *, num_devices: int | None = None) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order of its text.

    Args:
        text: what `jax.stages.Compiled.as_text()` returns.
        num_devices: devices of the program; None: as the text says (`num_partitions`, `replica_count`).

    Raises:
        ValueError: the text is not that of a compiled program, or groups of devices are written in an unknown form.
    """
    computations = read_computations(text)
    visits = count_visits(computations)
    devices = _num_devices(text) if num_devices is None else num_devices
    starts = _async_callers(computations)
    return tuple(
        _collective(visits, starts, computation, instruction, kind, devices)
        for computation in computations.values()
        if computation.name in visits
        for instruction, kind in _collectives_in(computation)
    )


def _collectives_in(computation: Computation) -> Iterator[tuple[Instruction, str]]:
    for instruction in computation.instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield instruction, kind


def _collective(
    visits: Mapping[str, tuple[Visits, ...]],
    starts: Mapping[str, tuple[Computation, Instruction]],
    computation: Computation,
    instruction: Instruction,
    kind: str,
    devices: int,
) -> Collective:
    """What is known of one collective."""
    groups = _groups(instruction.attributes)
    if kind == "collective-permute":
        group_size = 2
    else:
        group_size = max(map(len, groups)) if groups else devices
    operands = [operand for operand in map(computation.by_name().get, _data_operands(instruction, kind)) if operand]
    around = visits[computation.name]
    started = (computation, instruction) if instruction.opcode.endswith("-start") else starts.get(computation.name)
    between = () if started is None else _meanwhile(*started)
    operand_bytes = sum(type_bytes(operand.type) for operand in operands)
    return Collective(
        kind=kind,
        name=instruction.name,
        computation=computation.name,
        operand_types=tuple(short_type(operand.type) for operand in operands),
        operand_bytes=operand_bytes,
        result_bytes=_result_bytes(kind, operand_bytes, group_size, instruction),
        groups=groups,
        group_size=group_size,
        executions=sum(visit.times for visit in around),
        open_loops=max(len(visit.open_loops) for visit in around),
        is_async=started is not None and '"is_sync":true' not in started[1].attributes,
        meanwhile=between,
        op_name=instruction.op_name,
        forwards=_origin(computation, instruction) if operands else None,
    )


def _origin(computation: Computation, instruction: Instruction) -> str | None:
    """The kind of the collective that the first operand comes from, behind other names and copies for it."""
    instructions = computation.by_name()
    source = instructions.get(instruction.operands[0])
    while source is not None and source.opcode in ("bitcast", "copy", "get-tuple-element"):
        source = instructions.get(source.operands[0])
    kind = "" if source is None else source.opcode.removesuffix("-done")
    return kind if kind in KINDS else None


def _data_operands(instruction: Instruction, kind: str) -> tuple[str, ...]:
    """Names of the operands that hold what is sent, without offsets, sizes and the buffer that receives."""
    return instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands


def _result_bytes(kind: str, operand_bytes: int, group_size: int, instruction: Instruction) -> int:
    """What one device gets. The type of a start instruction holds operands and contexts too, so it is worked out."""
    match kind:
        case "all-gather":
            return operand_bytes * group_size
        case "reduce-scatter":
            return operand_bytes // group_size
        case "ragged-all-to-all" if not instruction.opcode.endswith("-start"):
            return type_bytes(instruction.type)
        case _:
            return operand_bytes


def _async_callers(computations: Mapping[str, Computation]) -> dict[str, tuple[Computation, Instruction]]:
    """Computation -> who starts it asynchronously."""
    return {
        called: (computation, instruction)
        for computation in computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "async-start"
        for called in instruction.called
    }


def _meanwhile(computation: Computation, start: Instruction) -> tuple[str, ...]:
    """Computing instructions between `start` and the instruction that awaits it."""
    names, between, begun = {start.name}, [], False
    for instruction in computation.instructions:
        if instruction is start:
            begun = True
        elif begun and names & set(instruction.operands) and instruction.opcode.endswith(("-done", "-update")):
            if instruction.opcode.endswith("-done"):
                break
            names.add(instruction.name)
        elif begun and instruction.opcode in COMPUTING:
            between.append(instruction.name)
    return tuple(between)


def _num_devices(text: str) -> int:
    head = text[: text.find("\n")]
    counts = [re.search(rf"\b{name}=(\d+)", head) for name in ("num_partitions", "replica_count")]
    return int(np.prod([int(found.group(1)) for found in counts if found]))


@functools.lru_cache(maxsize=256)
def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Groups of devices that an instruction's attributes name; none if they name none."""
    if pairs := _PAIRS.search(attributes):
        return _listed(pairs.group(1))
    if "replica_groups=" not in attributes or "replica_groups={}" in attributes:
        return ()
    if listed := _GROUP_LIST.search(attributes):
        return _listed(listed.group(1))
    if iota := _GROUP_IOTA.search(attributes):
        shape, dimensions, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
        ids = np.arange(np.prod(dimensions)).reshape(dimensions)
        return _rows((ids.transpose(order) if order else ids).reshape(shape))
    if mesh := _GROUP_MESH.search(attributes):
        return _mesh_groups(*mesh.groups())
    written = attributes[attributes.index("replica_groups=") :][:80]
    raise ValueError(f"groups of devices are written in a form that is not known: {written!r}")


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(int(position) for position in group.split(",") if position.strip())
        for group in re.findall(r"\{([\d,\s]*)\}", text)
    )


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes, or parts `'name':(before)size` of axes, of a mesh `'name'=size, …`."""
    sizes = {name: int(size) for name, size, _, _ in _MESH_AXIS.findall(axes)}
    wanted = {
        name: (int(before or 1), int(size or sizes[name])) for name, _, before, size in _MESH_AXIS.findall(grouped)
    }
    dimensions, chosen = [], []
    for name, size in sizes.items():
        before, part = wanted.get(name, (size, 1))
        dimensions += [before, part, size // (before * part)]
        chosen += [False, name in wanted, False]
    ids = np.arange(np.prod(dimensions))
    if device_ids:
        ids = _device_order(device_ids)
    ids = ids.reshape(dimensions)
    inner = [index for index, is_chosen in enumerate(chosen) if is_chosen]
    outer = [index for index, is_chosen in enumerate(chosen) if not is_chosen]
    group_size = int(np.prod([dimensions[index] for index in inner]))
    return _rows(ids.transpose(outer + inner).reshape(-1, group_size))


def _device_order(text: str) -> np.ndarray:
    """Order of devices of a mesh: a list, or an iota `[8,2]T(1,0)`."""
    if iota := re.fullmatch(r"\s*\[([\d,]+)\](?:T\(([\d,]+)\))?\s*", text):
        dimensions, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
        ids = np.arange(np.prod(dimensions)).reshape(dimensions)
        return (ids.transpose(order) if order else ids).reshape(-1)
    return np.array([int(position) for position in text.split(",")])


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(position) for position in row) for row in ids)
