"""What is said about a model compiled for devices that this machine lacks: does it fit, what does it move, how fast could it be."""

import dataclasses
from collections.abc import Iterator, Sequence

from moe_jax.aot.collectives import Collective, read_collectives
from moe_jax.aot.memory import MemoryUse
from moe_jax.aot.model_programs import CompiledProgram, ProgramName
from moe_jax.aot.roofline import Roofline, roofline
from moe_jax.aot.sizes import Sizes
from moe_jax.aot.targets import GpuTarget, Target
from moe_jax.aot.work import Step, Work, cache_per_device, model_flops, parameters_per_device, work_per_device
from moe_jax.models import CausalLM
from moe_jax.parallel import remote_dma

GPU_MEMORY_SHARE = 0.75
"""Part of a GPU's memory that jax takes unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""
NO_DECOMPOSER = "--xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer=false"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveRow:
    """Collectives of a program that are alike."""

    kind: str
    """As in `moe_jax.aot.collectives.KINDS`."""
    operands: tuple[str, ...]
    """Types of what one device gives."""
    group_size: int
    """How many devices take part together."""
    executions: int
    """How often such a collective runs in one run of the program; in a loop over tokens, for one token."""
    operand_bytes: int
    """Bytes that one device gives, each time."""
    total_bytes: int
    """Bytes that one device gives in one run of the program."""
    is_async: bool
    """It is started and awaited apart."""
    overlapped_by: int
    """How many computing instructions are scheduled between start and end."""
    between_hosts: bool
    """It joins GPUs of several hosts."""
    in_loop: bool
    """It is inside of a loop that ends when the data says so: of decode, it runs for each token. Otherwise it runs once each
    time the program is called."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """What is known of one program."""

    name: ProgramName
    compile_seconds: float
    """How long tracing and compiling took here."""
    fits: bool
    """Whether it fits into the memory of each device."""
    needed_bytes: int
    """What it needs of it; if a compiler that refused the program doesn't say, weights and cache alone."""
    available_bytes: int
    """What there is: of a program that the compiler refused, what the compiler has for programs."""
    memory: MemoryUse | None
    """What takes the room; None if the compiler refused the program."""
    collectives: tuple[CollectiveRow, ...]
    """What moves between devices; of decode, for one token."""
    model_flops: float
    """Products of the whole model, analytic; of decode, for one token of each row."""
    work: Work
    """What each device computes and reads, analytic; of decode, for one token of each row."""
    roofline: Roofline | None
    """The least time; None if the compiler refused the program, whose collectives are then unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What is known of a generation on a target."""

    target: str
    devices: int
    mesh: dict[str, int]
    """Positions along each axis."""
    mesh_reason: str | None
    """Why it is this mesh; None: it was asked for."""
    sizes: Sizes
    """Padded, as they were compiled."""
    dtype: str
    parameter_bytes: int
    """Bytes of parameters on each device."""
    cache_bytes: int
    """Bytes of the cache on each device."""
    programs: tuple[ProgramReport, ...]
    warnings: tuple[str, ...]
    """What the reader should know, one sentence each."""

    @property
    def fits(self) -> bool:
        """Whether every program fits, and there are both of them."""
        return len(self.programs) == 2 and all(program.fits for program in self.programs)


def report(
    model: CausalLM,
    target: Target,
    sizes: Sizes,
    mesh: dict[str, int],
    programs: Sequence[CompiledProgram],
    *,
    mesh_reason: str | None = None,
) -> CompileReport:
    """Put together what is known.

    Args:
        model: what was compiled.
        target: for what.
        sizes: of the generation, as asked for.
        mesh: positions along each axis.
        programs: what `compile_generation` returned.
        mesh_reason: why it is this mesh; None: it was asked for.
    """
    padded = sizes.padded()
    reports = tuple(_program_report(model, target, padded, program) for program in programs)
    return CompileReport(
        target=target.name,
        devices=1 if model.mesh is None else model.mesh.size,
        mesh=mesh,
        mesh_reason=mesh_reason,
        sizes=padded,
        dtype=model.dtype.name,
        parameter_bytes=parameters_per_device(model),
        cache_bytes=cache_per_device(model, batch_size=padded.batch_size, cache_length=padded.cache_length),
        programs=reports,
        warnings=tuple(_warnings(model, target, sizes, reports, programs)),
    )


def _program_report(model: CausalLM, target: Target, sizes: Sizes, program: CompiledProgram) -> ProgramReport:
    new_tokens = sizes.prompt_length if program.name == "prefill" else 1
    step = Step(batch_size=sizes.batch_size, new_tokens=new_tokens, cache_length=sizes.cache_length)
    work = work_per_device(model, step)
    collectives = _collectives(program)
    if program.refused is not None:
        held = parameters_per_device(model) + cache_per_device(
            model, batch_size=sizes.batch_size, cache_length=sizes.cache_length
        )
        needed = program.refused.needed_bytes or held
        available = program.refused.available_bytes or target.device.memory_bytes
        fits = False
    elif program.memory is not None:
        needed, available = program.memory.total_bytes, target.device.memory_bytes
        fits = needed <= available
    else:
        raise ValueError(f"{program.name} was neither compiled nor refused")
    return ProgramReport(
        name=program.name,
        compile_seconds=program.seconds,
        fits=fits,
        needed_bytes=needed,
        available_bytes=available,
        memory=program.memory,
        collectives=collective_rows(collectives, target.devices_per_host),
        model_flops=model_flops(model, step),
        work=work,
        roofline=None
        if program.refused is not None
        else roofline(
            work,
            [one for one in collectives if program.name == "prefill" or one.open_loops],
            target.device,
            devices_per_host=target.devices_per_host,
            is_bfloat16=model.dtype.name == "bfloat16",
        ),
    )


def _collectives(program: CompiledProgram) -> tuple[Collective, ...]:
    return read_collectives(program.text) if program.text else ()


def collective_rows(collectives: Sequence[Collective], devices_per_host: int | None) -> tuple[CollectiveRow, ...]:
    """Alike collectives in one row each, those that move the most bytes first; those of one device left out."""
    executions: dict[CollectiveRow, int] = {}
    for one in collectives:
        if one.group_size == 1:
            continue
        row = CollectiveRow(
            kind=one.kind,
            operands=one.operand_types,
            group_size=one.group_size,
            executions=0,
            operand_bytes=one.operand_bytes,
            total_bytes=0,
            is_async=one.is_async,
            overlapped_by=len(one.meanwhile),
            between_hosts=devices_per_host is not None and one.crosses(devices_per_host),
            in_loop=one.open_loops > 0,
        )
        executions[row] = executions.get(row, 0) + one.executions
    rows = [
        dataclasses.replace(row, executions=times, total_bytes=times * row.operand_bytes)
        for row, times in executions.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.total_bytes))


def _warnings(
    model: CausalLM,
    target: Target,
    asked: Sizes,
    reports: Sequence[ProgramReport],
    programs: Sequence[CompiledProgram],
) -> Iterator[str]:
    padded = asked.padded()
    if padded != asked:
        yield (
            f"lengths are padded to powers of two: {asked.prompt_length} prompt tokens to {padded.prompt_length}, room for "
            f"{asked.cache_length - asked.prompt_length} new ones to {padded.cache_length - padded.prompt_length}"
        )
    for program in reports:
        if not program.fits:
            short = program.needed_bytes - program.available_bytes
            yield (
                f"{program.name} does not fit: it needs {program.needed_bytes:,} bytes of each device, "
                f"{max(0, short):,} more than there are"
            )
    if len(reports) == 1:
        yield "decode was not compiled, because it takes over what prefill delivers, which does not fit"
    if model.partitioning is not None:
        yield from model.partitioning.remarks(model.decoder)
        positions = model.partitioning.size(model.partitioning.batch)
        if asked.batch_size % positions:
            yield (
                f"a batch of {asked.batch_size} cannot be split over the {positions} data positions: "
                "every device computes attention for all of it"
            )
    if model.parallel.strategy == remote_dma.NAME:
        yield (
            f"with the strategy {remote_dma.NAME} rows travel inside of a kernel: they are not among the collectives, and the "
            "least time of links leaves them out"
        )
    if isinstance(target, GpuTarget):
        yield from _gpu_warnings(target, reports, programs)


def _gpu_warnings(
    target: GpuTarget, reports: Sequence[ProgramReport], programs: Sequence[CompiledProgram]
) -> Iterator[str]:
    most = max(program.needed_bytes / program.available_bytes for program in reports)
    if GPU_MEMORY_SHARE < most <= 1:
        yield (
            f"it needs {most:.0%} of a GPU's memory, of which jax takes {GPU_MEMORY_SHARE:.0%} by default: "
            "set XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    for program in programs:
        moved = [one for one in _collectives(program) if one.crosses(target.gpus_per_host)]
        gathered = [one for one in moved if one.kind == "all-gather"]
        rewritten = [one for one in _collectives(program) if one.forwards == "all-gather" and "ragged" in one.kind]
        if rewritten and gathered:
            size = sum(one.total_operand_bytes * (one.group_size - 1) for one in gathered)
            yield (
                f"{program.name}: XLA rewrote ragged-all-to-all between hosts; all-gathers first bring every row of the other "
                f"hosts, {size:,} bytes to each device. XLA_FLAGS={NO_DECOMPOSER} keeps one operation for all hosts, if "
                "the network library can run it"
            )
