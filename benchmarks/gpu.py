"""The expert kernels on this machine's GPU: first right, then how fast, beside the device's ceilings and other libraries.

    python benchmarks/gpu.py                     # everything that fits into 8 minutes; needs jax with CUDA, nothing else
    python benchmarks/gpu.py --smoke             # only whether each kernel is right, on one small call; under a minute or two
    python benchmarks/gpu.py --quick             # the first cases only
    python benchmarks/gpu.py --only forward/qwen3-30b-a3b          # the cases whose names hold this: KIND/SHAPE/TTOKENS/ROUTING
    python benchmarks/gpu.py --only 'forward/*/T2048/uniform' --json FILE      # * is anything; a run per topic, a file per run
    python benchmarks/gpu.py --json FILE         # write here only; later, in the source tree: --from-json FILE
    python benchmarks/gpu.py --rehearse          # tiny shapes on the CPU: does the suite itself work?

The first cases are those of three telling shapes, beside what others offer; then come the other shapes, alone, and then more
sizes and skewed routing, as far as the minutes go. What a run did not reach it names; `--only` reaches it in another.

Works from a source tree in which nothing is installed. Writes `benchmarks/results/gpu_<device>.json` and the tables of
`docs/performance.md`; while it runs, after every row, FILE or `build/gpu_<device>.json`, so that nothing measured is lost. Ends
within its minutes, with status 1 if something failed or was wrong, with 3 if one step hung, and with 4 if all steps together
took too long and were cut off; the tables are written then too. A bar that was missed is in the table.
"""

import argparse
import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

# Before jax starts: torch needs memory beside it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.65")
if "--rehearse" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from source_tree import ROOT, use_source_tree

use_source_tree()

from moe_jax.benchmarking import gpu_suite  # noqa: E402
from moe_jax.benchmarking.contest import WorkerProcess, worker  # noqa: E402
from moe_jax.benchmarking.expert_contestants import contestants  # noqa: E402
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape  # noqa: E402
from moe_jax.benchmarking.gpu_cases import Case, all_cases, select  # noqa: E402
from moe_jax.benchmarking.gpu_ceilings import measure_ceilings  # noqa: E402
from moe_jax.benchmarking.gpu_programs import check_launches  # noqa: E402
from moe_jax.benchmarking.gpu_record import Record  # noqa: E402
from moe_jax.benchmarking.gpu_report import markdown, write_results  # noqa: E402
from moe_jax.benchmarking.gpu_smoke import smoke_test  # noqa: E402
from moe_jax.benchmarking.watchdog import TIME_OVER  # noqa: E402
from moe_jax.kernels.device import gpu_device_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PROGRESS = ROOT / "build"
WRITING_SECONDS = 15
LONGEST_STEP_SECONDS = 90
"""Longest time for a step that compiles what it runs."""
TORCH_START_SECONDS, TORCH_SECONDS = 90, 25
"""Longest wait for the first answer of torch's process, which imports torch and starts CUDA, and for each later one."""
REHEARSED = (
    ExpertShape(name="small", hidden_size=64, intermediate_size=32, num_experts=8, top_k=2),
    ExpertShape(name="small-rank", hidden_size=64, intermediate_size=32, num_experts=8, top_k=2, ranks=2),
)


def main() -> int:
    options = parse_arguments()
    started = time.monotonic()
    if options.from_json:
        result = json.loads(options.from_json.read_text())
        say(f"written: {write_results(result, folder=RESULTS, page=PAGE)} and {PAGE}")
        return 0
    with contextlib.ExitStack() as stack:
        torch = start_torch(options, stack)
        record = new_record(options)
        # If even the watchdog hangs.
        faulthandler.dump_traceback_later(60 * options.minutes + WRITING_SECONDS, exit=True)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        with record.step("suite"), record.watch("the whole run", 60 * options.minutes, TIME_OVER):
            measure(options, record, torch, deadline=started + 60 * options.minutes - WRITING_SECONDS)
    record.result["seconds"] = time.monotonic() - started
    record.save()
    if not options.smoke:
        with record.step("tables"):
            record.publish()
    for failure in record.failures:
        say(f"FAILED: {failure[:200]}")
    return 1 if record.failures else 0


def new_record(options: argparse.Namespace) -> Record:
    """What is known before anything is measured.

    Raises:
        SystemExit: there is no GPU.
    """
    device = gpu_device_of()
    if device is None and not options.rehearse:
        raise SystemExit(
            f"no NVIDIA GPU: jax {jax.__version__} has {jax.devices()}; to try the suite itself use --rehearse"
        )
    result = {
        "rehearsal": options.rehearse,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "device_name": device.name if device else "none",
        "versions": versions(),
        "seed": options.seed,
        "ceilings": None,
    }
    name = f"gpu_{result['device_name']}{'_smoke' if options.smoke else ''}.json"
    file = options.json or (None if options.rehearse else PROGRESS / name)
    cases = tuple(case.name for case in chosen_cases(options))
    return Record(result, file, cases, say, functools.partial(publish, options, result))


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """What the options ask for."""
    rehearsed = (REHEARSED, (1, 8), (8,), [REHEARSED[0].name])
    return select(all_cases(*rehearsed) if options.rehearse else all_cases(), only=options.only, quick=options.quick)


def measure(options: argparse.Namespace, record: Record, torch: WorkerProcess | str, *, deadline: float) -> None:
    """Whether the kernels are right at all, then the ceilings, then case by case."""
    cases, result, device = chosen_cases(options), record.result, gpu_device_of()
    rng = np.random.default_rng(options.seed)
    failed = dict(smoke_test({case.kind for case in cases}, rng, watch=record.watch, report=say))
    result["failed_steps"] |= {f"smoke test, {kernel}": why for kernel, why in failed.items()}
    record.save()
    if options.smoke or "device" in failed:
        return
    sizes = {"width": 128, "copied_bytes": 1 << 20} if options.rehearse else {}
    with record.watch("ceilings", LONGEST_STEP_SECONDS):
        ceilings = measure_ceilings(**sizes)
    result["ceilings"] = dataclasses.asdict(ceilings)
    say(f"{result['device']}: {ceilings}")
    with record.step("launches"), record.watch("launches", LONGEST_STEP_SECONDS):
        result["launches"] = launches(options)
    suite = gpu_suite.Suite(
        ceilings=ceilings,
        rng=rng,
        deadline=deadline,
        l2_bytes=device.l2_bytes if device else 1 << 16,
        compile_threads=options.compile_threads,
        rivals=options.rivals,
        report=say,
        save=record.save,
        watch=record.watch,
        rows=result["rows"],
        unable=result["unable"],
    )
    described = describe_torch(torch)
    if isinstance(torch, str) or isinstance(described, str):
        suite.unable["torch grouped_mm"] = str(described)
    else:
        result["versions"] |= described
        suite.torch = torch
    suite.run(cases)


def publish(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The tables on the terminal, and what was measured among the results; a run that measured nothing replaces none."""
    say("\n" + ("REHEARSAL: these times mean nothing\n\n" if options.rehearse else "") + markdown(result))
    measured = any(row.get("seconds") for row in result["rows"])
    if measured and not options.json and not options.rehearse:
        say(f"written: {write_results(result, folder=RESULTS, page=PAGE)} and {PAGE}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=8, help="time to use, compiling included (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="only check each kernel on one small call, and time nothing"
    )
    parser.add_argument("--quick", action="store_true", help="only the most informative cases")
    parser.add_argument(
        "--only", metavar="PATTERN", help="only cases whose name contains PATTERN; * stands for anything"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, and nowhere else")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, publish the results in FILE")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU; never written into the results"
    )
    parser.add_argument("--no-rivals", dest="rivals", action="store_false", help="leave out the other libraries")
    parser.add_argument(
        "--torch-python", default=sys.executable, metavar="PYTHON", help="a Python that has torch (default: this one)"
    )
    parser.add_argument(
        "--compile-threads",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="programs to compile at once (default: %(default)s on this machine)",
    )
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="seed of the random numbers (default: the clock)"
    )
    return parser.parse_args()


def launches(options: argparse.Namespace) -> list[dict]:
    """That a call is traced once, whatever the routing, and moves nothing to the host."""
    shape = REHEARSED[0] if options.rehearse else EXPERT_SHAPES["olmoe-1b-7b"]
    ours = [contestant for contestant in contestants(shape, 8)[0] if contestant.is_ours]
    return [check_launches(contestant, shape, 8, np.random.default_rng(options.seed)) for contestant in ours[:1]]


def start_torch(options: argparse.Namespace, stack: contextlib.ExitStack) -> WorkerProcess | str:
    """Torch's process, which ends with the stack, or why there is none. First of all, because importing torch takes long."""
    if options.smoke or not options.rivals:
        return "not asked for"
    command = [options.torch_python, str(Path(__file__).with_name("gpu_torch.py"))]
    try:
        return stack.enter_context(worker(command, environment=os.environ, answer_seconds=TORCH_START_SECONDS))
    except OSError as error:
        return f"{options.torch_python} cannot be started: {error}"


def describe_torch(torch: WorkerProcess | str) -> dict[str, str] | str:
    """Torch's versions, or why it cannot be used: the suite goes on without it."""
    if isinstance(torch, str):
        return torch
    try:
        described = torch.request("describe")
    except (RuntimeError, ValueError) as error:  # it is gone, or answers something else
        return f"torch cannot be used: {error}"
    torch.answer_seconds = TORCH_SECONDS
    unable = described.get("unavailable") or described.get("failed")
    return f"torch cannot be used: {unable}" if unable else described


def versions() -> dict[str, str]:
    """Of what was measured; the sources by digest, because they may not be installed."""
    found = {"python": platform.python_version(), "jax": jax.__version__, "kernels": digest(ROOT / "kernels")}
    for name in ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "tokamax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def digest(folder: Path) -> str:
    """SHA-256 over the Python files and tuned tables of a folder: its first 16 digits."""
    sha = hashlib.sha256()
    for file in sorted((*folder.rglob("*.py"), *folder.rglob("*.json"))):
        sha.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()[:16]


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a device that was lost may hang or crash on the orderly way out
