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
_LOSS = r"\((C\d+)\) Potential Performance Loss: (.*?)(?: in(?: the)? function '.*)?\n"
"""What ptxas says of a kernel that will be slow: a code, and why; the function's name is left out."""


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

_WRITES = ("stmatrix", "st.shared", *(f"st.{kind}" for kind in ("b8", "b16", "b32", "b64", "b128", "v2", "v4")))
"""A thread's own writes to shared memory; those without an address space may be such."""
_READS = ("ldmatrix", "ld.shared")
_BULK_LOADS = tuple(f"cp.async.bulk.tensor.{rank}d.shared" for rank in range(1, 6))
"""Copies from global to shared memory, which one thread starts for all."""
_BULK_STORES = tuple(f"cp.async.bulk.tensor.{rank}d.global" for rank in range(1, 6))
"""Copies from shared to global memory, likewise."""
_MULTIPLICATIONS = tuple(instruction.name for instruction in _ASYNCHRONOUS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Order:
    """Accesses to shared memory that come in order only if something lies between them.

    Copies and tensor cores access it by a way of their own (the async proxy), asynchronously and regardless of barriers.
    """

    earlier: tuple[str, ...]
    later: tuple[str, ...]
    between: str
    otherwise: str
    """What may happen if it is missing."""
    leading_to: tuple[str, ...] = ()
    """If given, only later ones count that lead to one of these: writes of what is copied, not of what is multiplied."""


_ORDERS = (
    _Order(
        earlier=_READS,
        later=_BULK_LOADS,
        between="bar.sync",
        otherwise="a copy may overwrite what another thread has yet to read",
    ),
    *(
        order
        for later, reader in ((_BULK_STORES, "a copy"), (_MULTIPLICATIONS, "a multiplication"))
        for order in (
            _Order(
                earlier=_WRITES,
                later=later,
                between="fence.proxy.async",
                otherwise=f"{reader} may read what was there before a write",
            ),
            _Order(
                earlier=("fence.proxy.async",),
                later=later,
                between="bar.sync",
                otherwise=f"{reader} may read what was there before another thread's write",
            ),
        )
    ),
    _Order(
        earlier=_BULK_STORES,
        later=("cp.async.bulk.wait_group",),
        between="cp.async.bulk.commit_group",
        otherwise="a copy is not waited for",
    ),
    _Order(
        earlier=_BULK_STORES,
        later=_WRITES,
        leading_to=_BULK_STORES,
        between="cp.async.bulk.wait_group",
        otherwise="a write may change what a copy has yet to read",
    ),
    _Order(
        earlier=("cp.async.bulk.wait_group",),
        later=_WRITES,
        between="bar.sync",
        otherwise="a write may change what a copy has yet to read, for which another thread waits",
    ),
    _Order(
        earlier=_BULK_STORES,
        later=("ret", "exit"),
        between="cp.async.bulk.wait_group",
        otherwise="the kernel may end before a copy has read all",
    ),
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
    losses: tuple[str, ...]
    """What ptxas says costs speed: wgmma of which it runs one after the other, because registers don't suffice (C7511) or
    accumulators are touched meanwhile (C7515), or setmaxnreg that it ignores (C7508), for instance."""
    unawaited: tuple[str, ...]
    """Ways in which a tensor-core instruction can run again with nothing waiting for its last run."""
    unordered: tuple[str, ...]
    """Accesses to shared memory that may come in the wrong order."""

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
            losses=tuple(f"{what} ({code})" for code, what in re.findall(_LOSS, text)),
            unawaited=tuple(
                f"{instruction.name} repeats without {awaited_by}"
                for instruction in _ASYNCHRONOUS
                for awaited_by in instruction.awaited_by
                if flow.repeats_without(instruction.name, awaited_by, predicated=instruction.by_one_thread)
            ),
            unordered=tuple(
                f"{order.otherwise}: {order.between} is missing"
                for order in _ORDERS
                if flow.reaches_without(order.earlier, order.later, order.between, leading_to=order.leading_to)
            ),
        )

    def shortcomings(self, device: GpuDevice) -> tuple[str, ...]:
        """What makes the kernel unfit: spills, a stack, other losses, missing waits, fences or barriers, too much memory."""
        found = []
        if self.spill_store_bytes or self.spill_load_bytes or self.stack_bytes:
            found.append(
                f"{self.spill_store_bytes} bytes of spill stores, {self.spill_load_bytes} of spill loads,"
                f" {self.stack_bytes} of stack"
            )
        found += self.losses
        if self.shared_memory_bytes > device.shared_memory_bytes:
            found.append(
                f"{self.shared_memory_bytes} bytes of shared memory, {device.name} has {device.shared_memory_bytes}"
            )
        return (*found, *self.unawaited, *self.unordered)


@contextlib.contextmanager
def dumping_to(file: Path) -> Iterator[None]:
    """Have Mosaic GPU write what `KernelReport.of_dump` reads into `file` while one kernel is compiled.

    It prints to the standard output of the process, which goes to `file` meanwhile, as does all that others print.
    (It can also write to a folder, but then dumps all its passes, which takes longer than compiling.)
    """
    libc = ctypes.CDLL(None)

    def flush() -> None:
        sys.stdout.flush()
        libc.fflush(None)

    with file.open("wb") as opened, contextlib.ExitStack() as undo:
        for name in _DUMPED:
            undo.callback(_set_variable, name, os.environ.get(name))
            os.environ[name] = "1"
        standard_output = os.dup(1)
        undo.callback(os.close, standard_output)
        flush()
        undo.callback(os.dup2, standard_output, 1)
        os.dup2(opened.fileno(), 1)
        undo.callback(flush)
        yield


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _find(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the report of the compilers has nothing that looks like {pattern}")
    return match.groups()
