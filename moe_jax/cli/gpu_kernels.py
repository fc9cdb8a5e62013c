"""`moe-jax bench gpu-kernels`: times kernels with their tile sizes, and tunes these."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moe_jax.benchmarking import kernel_tuning
from moe_jax.benchmarking.device_timer import Timing
from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.benchmarking.gpu_ceilings import measure_ceilings
from moe_jax.benchmarking.kernel_tuning import Measure, Problem
from moe_jax.cli import exit_codes
from moe_jax.cli.output import print_json, print_table, remark
from moe_jax.kernels.device import GpuDevice
from moe_jax.kernels.mosaic_gpu.tuning import user_file, write_entries


def time_and_show(
    arguments: argparse.Namespace, shapes: Sequence[ExpertShape], tokens: Sequence[int], device: GpuDevice
) -> int:
    """Time each kernel with the tiles that it would use; the exit status."""
    events, rows, status = _device_events(), [], exit_codes.SUCCESS
    for problem in _problems(arguments, shapes, tokens, device):
        chosen = kernel_tuning.chosen_tiles(problem, device)
        timing = _measure(problem, device, events)([None, chosen.tiles])[1]
        time = timing.seconds * 1e6 if isinstance(timing, Timing) else None
        if isinstance(timing, str):
            status = exit_codes.CHECK_FAILED
            remark(f"{problem.name}: {timing}")
        rows.append({"problem": problem.name, "tiles": str(chosen.tiles), "why": chosen.reason, "microseconds": time})
    if arguments.json:
        print_json({"device": device.name, "kernels": rows})
    else:
        print_table(f"Expert kernels on {device.name}", list(rows[0]), [list(row.values()) for row in rows])
    return status


def tune_and_show(
    arguments: argparse.Namespace, shapes: Sequence[ExpertShape], tokens: Sequence[int], device: GpuDevice
) -> int:
    """Tune each kernel and write what was found, kernel by kernel; the exit status."""
    file: Path = arguments.into or user_file(device.name)
    events, rows = _device_events(), []
    for problem in _problems(arguments, shapes, tokens, device):
        remark(f"tuning {problem.name}")
        measure = _measure(problem, device, events)
        outcome = kernel_tuning.tune(problem, device, measure, most_candidates=arguments.most_candidates)
        if outcome.entry is not None:
            write_entries(file, device.name, [outcome.entry])
        for tiles, why in outcome.failed.items():
            remark(f"  {tiles}: {why}")
        entry = None if outcome.entry is None else dataclasses.asdict(outcome.entry)
        rows.append({"problem": problem.name, "outcome": outcome.why, "entry": entry})
    if arguments.json:
        print_json({"device": device.name, "file": file, "kernels": rows})
    else:
        kept = sum(row["entry"] is not None for row in rows)
        print_table(
            f"Tuned on {device.name}: {kept} entries written to {file}",
            ["problem", "outcome"],
            [(row["problem"], row["outcome"]) for row in rows],
        )
    return exit_codes.SUCCESS


def _problems(
    arguments: argparse.Namespace, shapes: Sequence[ExpertShape], tokens: Sequence[int], device: GpuDevice
) -> list[Problem]:
    """Those with different tiles to look up; problems of two shapes may share them."""
    found = [
        problem
        for shape in shapes
        for number in tokens
        for problem in kernel_tuning.problems(shape, number, device, backward=arguments.backward)
    ]
    return list({(problem.kernel, problem.kernel_shape): problem for problem in reversed(found)}.values())[::-1]


def _measure(problem: Problem, device: GpuDevice, device_events: bool) -> Measure:
    return kernel_tuning.measure_on_device(problem, device, device_events=device_events)


def _device_events() -> bool:
    """Whether the profiler's events can be used; says so if not."""
    ceilings = measure_ceilings(width=4096, copied_bytes=1 << 28)
    if not ceilings.device_events:
        remark(f"times are taken {ceilings.timer}")
    return ceilings.device_events
