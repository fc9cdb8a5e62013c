"""What the compilers report about one Mosaic GPU kernel, and what in it must not be."""

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_jax.aot.ptx import ControlFlow
from moe_jax.kernels.device import GpuDevice

_DUMPED = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES")
_BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asynchronous:
    """A tensor-core instruction that returns before it is done."""

    name: str
    awaited_by: tuple[str, ...]
    """What must lie between one step of a loop and the next: each of these."""
    by_one_thread: bool
    """Whether an elected thread issues it, and what awaits it, for all others."""


_ASYNCHRONOUS = (
    _Asynchronous(name="wgmma.mma_async", awaited_by=("wgmma.wait_group",), by_one_thread=False),
    _Asynchronous(name="tcgen05.mma", awaited_by=("tcgen05.commit", "mbarrier.try_wait"), by_one_thread=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """One compiled kernel."""

    function: str
    """Its name in PTX."""
    architecture: str
    """"sm_90a", "sm_100a" …"""
    registers: int
    """Per thread, before kernels redistribute them among warpgroups."""
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_memory_bytes: int
    """Of a block: buffers and barriers."""
    tensor_memory_columns: int
    """Of a block; Blackwell only."""
    tensor_core_instructions: int
    """How many asynchronous ones (wgmma or tcgen05.mma) the code has."""
    serialised: bool
    """Whether ptxas had to wait after every wgmma (C7511): accumulators are touched while one may be running."""
    unawaited: tuple[str, ...]
    """Ways in which a tensor-core instruction can run again with nothing waiting for its last run."""

    @classmethod
    def of_dump(cls, text: str) -> "KernelReport":
        """Read what Mosaic GPU printed while it compiled one kernel: resources, PTX and ptxas' words, in any order.

        Raises:
            ValueError: one of the three is missing, or there is more than one kernel. A kernel that was compiled before in the
                process prints neither PTX nor ptxas' words.
        """
        functions = re.findall(r"Compiling entry function '([^']+)' for '([^']+)'", text)
        if len(functions) != 1:
            raise ValueError(f"ptxas' report on one kernel expected, found {[name for name, _ in functions]}")
        ((function, architecture),) = functions
        frame = _find(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        resources = _find(r"Resources\(smem_scratch_bytes=(\d+), tmem_scratch_cols=(\d+), (.*)\)", text)
        barriers = re.findall(r"num_barriers=(\d+), orders_tensor_core=\w+\): (\d+)", resources[2])
        ptx = _find(r"(?s)(\.version .*?\n\}\n)", text)[0]
        flow = ControlFlow.of(ptx)
        return cls(
            function=function,
            architecture=architecture,
            registers=int(_find(r"Used (\d+) registers", text)[0]),
            stack_bytes=int(frame[0]),
            spill_store_bytes=int(frame[1]),
            spill_load_bytes=int(frame[2]),
            shared_memory_bytes=int(resources[0]) + _BARRIER_BYTES * sum(int(n) * int(times) for n, times in barriers),
            tensor_memory_columns=int(resources[1]),
            tensor_core_instructions=sum(flow.count(instruction.name) for instruction in _ASYNCHRONOUS),
            serialised="C7511" in text,
            unawaited=tuple(
                f"{instruction.name} repeats without {awaited_by}"
                for instruction in _ASYNCHRONOUS
                for awaited_by in instruction.awaited_by
                if flow.repeats_without(instruction.name, awaited_by, predicated=instruction.by_one_thread)
            ),
        )

    def shortcomings(self, device: GpuDevice) -> tuple[str, ...]:
        """What makes the kernel unfit: spills, a stack, serialised wgmma, missing waits, too much shared memory."""
        found = []
        if self.spill_store_bytes or self.spill_load_bytes or self.stack_bytes:
            found.append(
                f"{self.spill_store_bytes} bytes of spill stores, {self.spill_load_bytes} of spill loads,"
                f" {self.stack_bytes} of stack"
            )
        if self.serialised:
            found.append("wgmma serialised (C7511)")
        if self.shared_memory_bytes > device.shared_memory_bytes:
            found.append(
                f"{self.shared_memory_bytes} bytes of shared memory, {device.name} has {device.shared_memory_bytes}"
            )
        return (*found, *self.unawaited)


@contextlib.contextmanager
def dumping_to(file: Path) -> Iterator[None]:
    """Have Mosaic GPU write what `KernelReport.of_dump` reads into `file` while one kernel is compiled.

    It prints to the standard output of the process, which goes to `file` meanwhile, as does all that others print.
    (It can also write to a folder, but then dumps all its passes, which takes longer than compiling.)
    """
    libc = ctypes.CDLL(None)
    before = {name: os.environ.get(name) for name in _DUMPED}
    sys.stdout.flush()
    libc.fflush(None)
    standard_output = os.dup(1)
    with file.open("wb") as opened:
        os.dup2(opened.fileno(), 1)
    os.environ.update(dict.fromkeys(_DUMPED, "1"))
    try:
        yield
    finally:
        sys.stdout.flush()
        libc.fflush(None)
        os.dup2(standard_output, 1)
        os.close(standard_output)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _find(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the report of the compilers has nothing that looks like {pattern}")
    return match.groups()
