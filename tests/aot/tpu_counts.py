"""Compile a TPU kernel, and count what it executes and copies; what was counted once is kept in a folder."""

import functools
import hashlib
import itertools
import json
import math
import operator
import re
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_jax.aot import bundles, scalar_unit
from moe_jax.aot.bundles import Schedule
from moe_jax.aot.scalar_unit import Execution
from moe_jax.aot.targets import TpuTarget
from moe_jax.aot.tpu_calls import TpuKernelCall

Figures = dict[str, Any]
_READERS = b"".join(Path(file).read_bytes() for file in (bundles.__file__, scalar_unit.__file__, __file__))


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def counted(
    target: TpuTarget,
    calls: Mapping[str, Sequence[TpuKernelCall]],
    useful: Mapping[str, float],
    *,
    dumps: Path,
    kept: Path,
    deadline: float,
) -> Figures:
    """The figures of one kernel, for scalars under several names, and of its code.

    Args:
        target: what to compile for.
        calls: of the same kernel, with scalars that differ; the first is compiled. Those of one name are counted together.
        useful: multiplications of numbers that rows of experts need, for each name.
        dumps: see `TpuKernelCall.schedule_alone`.
        kept: folder of figures; those of the same kernel, scalars and versions are not counted again.
        deadline: time from which on nothing more is compiled.

    Returns:
        "code_bundles", "vmem_bytes", "seconds" to compile, and for each name its figures: of the slower core, but bytes of all
        cores. Instead of these "not_counted", if what is executed depends on more than scalars.

    Raises:
        TimeoutError: the kernel would have to be compiled, and the deadline is over.
    """
    call = next(iter(calls.values()))[0]
    scalars = [[sorted(call.scalars.items()) for call in named] for named in calls.values()]
    described = f"{target} {versions()} {_without_addresses(call.sameness())} {list(calls)} {scalars} {useful}"
    file = kept / f"{hashlib.sha256(described.encode() + _READERS).hexdigest()}.json"
    if file.exists():
        return json.loads(file.read_text())
    if time.time() > deadline:
        raise TimeoutError("no time is left to compile it")
    started = time.perf_counter()
    schedule = call.schedule_alone(target, dumps)
    found: Figures = {
        "code_bundles": len(schedule),
        "vmem_bytes": call.vmem_bytes(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    try:
        # A kernel may ask for its core where there is one alone.
        cores = min(schedule.cores, target.device.cores)
        found |= {name: _figures(schedule, named, useful[name], cores) for name, named in calls.items()}
    except ValueError as error:
        found["not_counted"] = str(error)[:300]
    kept.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n")
    return found


def digest(described: str, call: TpuKernelCall) -> str:
    """Equal for the same kernel, compiled for what is described."""
    return hashlib.sha256(f"{described} {_without_addresses(call.sameness())}".encode()).hexdigest()


def _figures(schedule: Schedule, calls: Sequence[TpuKernelCall], useful_multiplies: float, cores: int) -> Figures:
    """Raises ValueError if one core writes more than the results hold: then instructions were not carried out as a TPU does.

    Of two cores that share an odd number of tiles, one computes a tile again.
    """
    executions = [
        functools.reduce(operator.add, (call.execute(schedule, core=core) for call in calls)) for core in range(cores)
    ]
    slowest: Execution = max(executions, key=lambda execution: execution.bundles)
    spills = sum(execution.slots("VSTORE:SPILL") for execution in executions)
    written_bytes = sum(sum(execution.written_bytes.values()) for execution in executions)
    result_bytes = sum(_padded_size(result.shape) * result.dtype.itemsize for call in calls for result in call.results)
    if cores == 1 and written_bytes > result_bytes:
        raise ValueError(f"{written_bytes} bytes are written, but the results have {result_bytes}")
    return {
        "bundles": slowest.bundles,
        "matmul_slots": slowest.slots("MATMUL"),
        "occupancy": round(slowest.matmul_occupancy, 4),
        "spills_per_billion_multiplies": round(spills / useful_multiplies * 1e9, 3) if useful_multiplies else 0,
        "read_bytes": sum(sum(execution.read_bytes.values()) for execution in executions),
        "written_bytes": written_bytes,
    }


def _padded_size(shape: tuple[int, ...]) -> int:
    """Elements that an array has room for in device memory, in tiles of up to 16 rows and 128 columns."""
    units = itertools.chain((128, 16), itertools.repeat(1))
    return math.prod(-(-size // unit) * unit for size, unit in zip(reversed(shape), units, strict=False))


def _without_addresses(text: str) -> str:
    """Objects in the text of a program have other addresses in every process."""
    return re.sub(r"0x[0-9a-f]+", "", text)
