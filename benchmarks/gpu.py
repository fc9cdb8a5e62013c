"""The expert kernels on the GPU at hand: first right, then how fast, beside the device's ceilings and what others offer.

    python benchmarks/gpu.py                     # everything that fits into 8 minutes; needs jax with CUDA, nothing else
    python benchmarks/gpu.py --smoke             # only whether each kernel is right, on one small call; under a minute or two
    python benchmarks/gpu.py --quick             # the first cases only
    python benchmarks/gpu.py --only forward/qwen3
    python benchmarks/gpu.py --json FILE         # write here only; later, in the source tree: --from-json FILE
    python benchmarks/gpu.py --rehearse          # tiny shapes on the CPU: does the suite itself work?

Works from a source tree in which nothing is installed. Writes `benchmarks/results/gpu_<device>.json` and the tables of
`docs/performance.md`; while it runs, after every row, FILE or `build/gpu_<device>.json`, so that nothing measured is lost. Ends
with status 1 if something failed or was wrong, with 3 if something hung, and within its minutes; a bar that was missed is in
the table.
"""

import argparse
import contextlib
import dataclasses
import datetime
import faulthandler
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

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
from moe_jax.benchmarking.contest import worker  # noqa: E402
from moe_jax.benchmarking.expert_contestants import contestants  # noqa: E402
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape  # noqa: E402
from moe_jax.benchmarking.gpu_cases import all_cases, select  # noqa: E402
from moe_jax.benchmarking.gpu_ceilings import measure_ceilings  # noqa: E402
from moe_jax.benchmarking.gpu_programs import check_launches  # noqa: E402
from moe_jax.benchmarking.gpu_record import Record  # noqa: E402
from moe_jax.benchmarking.gpu_report import markdown, write_results  # noqa: E402
from moe_jax.benchmarking.gpu_smoke import smoke_test  # noqa: E402
from moe_jax.kernels.device import gpu_device_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PROGRESS = ROOT / "build"
WRITING_SECONDS = 15
LONGEST_STEP_SECONDS = 90
"""Longest time for a step that compiles what it runs."""
TORCH_SECONDS = 25
"""Longest wait for an answer of torch's process."""
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
    device = gpu_device_of()
    if device is None and not options.rehearse:
        raise SystemExit(
            f"no NVIDIA GPU: jax {jax.__version__} has {jax.devices()}; to try the suite itself use --rehearse"
        )
    cases = all_cases(REHEARSED, (1, 8), (8,)) if options.rehearse else all_cases()
    cases = select(cases, only=options.only, quick=options.quick)
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
    rng = np.random.default_rng(options.seed)
    record = Record(result, file, tuple(case.name for case in cases), say)
    faulthandler.dump_traceback_later(60 * options.minutes + WRITING_SECONDS, exit=True)  # if even the watchdog hangs
    with record.step("suite"), contextlib.ExitStack() as stack:
        stack.callback(faulthandler.cancel_dump_traceback_later)
        stack.enter_context(record.watch("the whole run", 60 * options.minutes))
        failed = dict(smoke_test({case.kind for case in cases}, rng, watch=record.watch, report=say))
        result["failed_steps"] |= {f"smoke test, {kernel}": why for kernel, why in failed.items()}
        record.save()
        if options.smoke or "device" in failed:
            return finish(record)
        sizes = {"width": 128, "copied_bytes": 1 << 20} if options.rehearse else {}
        with record.watch("ceilings", LONGEST_STEP_SECONDS):
            ceilings = measure_ceilings(**sizes)
        result["ceilings"] = dataclasses.asdict(ceilings)
        say(f"{result['device']}: {ceilings}")
        suite = gpu_suite.Suite(
            ceilings=ceilings,
            rng=rng,
            deadline=started + 60 * options.minutes - WRITING_SECONDS,
            l2_bytes=device.l2_bytes if device else 1 << 16,
            compile_threads=options.compile_threads,
            rivals=options.rivals,
            report=say,
            save=record.save,
            watch=record.watch,
            rows=result["rows"],
            unable=result["unable"],
        )
        if options.rivals:
            command = [options.torch_python, str(Path(__file__).with_name("gpu_torch.py"))]
            suite.torch = stack.enter_context(worker(command, environment=os.environ, answer_seconds=TORCH_SECONDS))
            result["versions"] |= describe_torch(suite)
        with record.step("launches"), record.watch("launches", LONGEST_STEP_SECONDS):
            result["launches"] = launches(options)
        suite.run(cases)
    result["seconds"] = time.monotonic() - started
    record.save()
    with record.step("tables"):
        say("\n" + ("REHEARSAL: these times mean nothing\n\n" if options.rehearse else "") + markdown(result))
        if not options.json and not options.rehearse:
            say(f"written: {write_results(result, folder=RESULTS, page=PAGE)} and {PAGE}")
    return finish(record)


def finish(record: Record) -> int:
    """Say what failed; the exit status."""
    for failure in record.failures:
        say(f"FAILED: {failure[:200]}")
    return 1 if record.failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=8, help="time to use, compiling included (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="only check each kernel on one small call; time nothing")
    parser.add_argument("--quick", action="store_true", help="only the cases of the first priority")
    parser.add_argument("--only", metavar="PATTERN", help="only cases whose name holds this; * is anything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, and nowhere else")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing; publish these results")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU; never written into the results"
    )
    parser.add_argument("--no-rivals", dest="rivals", action="store_false", help="leave out what others offer")
    parser.add_argument("--torch-python", default=sys.executable, help="Python that has torch (default: this one)")
    parser.add_argument("--compile-threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random numbers (default: the clock)")
    return parser.parse_args()


def launches(options: argparse.Namespace) -> list[dict]:
    """That a call is traced once, whatever the routing, and moves nothing to the host."""
    shape = REHEARSED[0] if options.rehearse else EXPERT_SHAPES["olmoe-1b-7b"]
    ours = [contestant for contestant in contestants(shape, 8)[0] if contestant.is_ours]
    return [check_launches(contestant, shape, 8, np.random.default_rng(options.seed)) for contestant in ours[:1]]


def describe_torch(suite: gpu_suite.Suite) -> dict[str, str]:
    """Torch's versions; without torch the suite goes on without it."""
    assert suite.torch is not None
    try:
        described = suite.torch.request("describe")
    except RuntimeError as error:
        described = {"unavailable": f"torch cannot be used: {error}"}
    if "unavailable" not in described:
        return described
    suite.unable["torch grouped_mm"] = described["unavailable"]
    suite.torch = None
    return {}


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
