"""Converting a checkpoint: how fast against `cp -r` of the same folder, and how much memory at most.

    python benchmarks/convert.py [--rounds 5] [--folder TMP] [--json FILE] [--only speed|memory]

Speed: three layers of Qwen3-30B-A3B's shape (5 GB, sharded). `cp -r` and the conversion alternate, every conversion in a
fresh process, both timed until `sync` has returned; every round is printed. The conversion's time is that of the call in a
process that has imported everything; the time of the whole process, imports included, stands beside it.

Memory: one layer of DeepSeek-V3's true shape with its embedding and output table, in block FP8 (15 GB, 27 GB decoded).
Printed are the largest RssAnon seen (sampled every 20 ms) and VmHWM of the converting process.

Needs 45 GB of disk in `--folder`, and leaves nothing there.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SPEED_BAR = 0.9
MEMORY_BAR_MB = 3000
SHARD_BYTES = 1 << 30


def memory_mb(field: str) -> float:
    """A field of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def convert_here(source: str, output: str) -> None:
    """The child process: convert, sync, print what it took as JSON."""
    from moe_jax.checkpoints import convert, orbax_part  # noqa: F401 - imports Orbax, which is not to be timed

    largest = memory_mb("RssAnon")
    finished = threading.Event()

    def sample() -> None:
        nonlocal largest
        while not finished.wait(0.02):
            largest = max(largest, memory_mb("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        started = time.perf_counter()
        report = convert(source, output)
        os.sync()
        seconds = time.perf_counter() - started
    finally:
        finished.set()
        sampler.join()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "output_bytes": report.nbytes,
                "parts": report.parts,
                "RssAnon_MB": largest,
                "VmHWM_MB": memory_mb("VmHWM"),
            }
        )
    )


def convert_in_child(source: Path, output: Path) -> dict[str, Any]:
    """One conversion in a fresh process; its own measurements and the process's seconds."""
    started = time.perf_counter()
    child = subprocess.run(
        [sys.executable, __file__, "--child", str(source), str(output)], capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise RuntimeError(f"the conversion failed:\n{child.stderr}")
    return {**json.loads(child.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - started}


def copy_seconds(source: Path, output: Path) -> float:
    """Seconds of `cp -r` and `sync`."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(output)], check=True)
    os.sync()
    return time.perf_counter() - started


def measure_speed(folder: Path, rounds: int) -> dict[str, Any]:
    """Copy and convert in turn."""
    from moe_jax.benchmarking.synthetic_checkpoint import QWEN3_LIKE, write_synthetic_checkpoint

    source, output = folder / "source", folder / "output"
    nbytes = write_synthetic_checkpoint(source, QWEN3_LIKE, SHARD_BYTES)
    os.sync()
    results = []
    for number in range(rounds):
        copied = copy_seconds(source, output)
        shutil.rmtree(output)
        os.sync()
        converted = convert_in_child(source, output)
        shutil.rmtree(output)
        os.sync()
        results.append({"cp_seconds": copied, **converted})
        print(
            f"round {number}: cp -r {copied:6.2f} s, {nbytes / 1e6 / copied:5.0f} MB/s; "
            f"convert {converted['seconds']:6.2f} s, {nbytes / 1e6 / converted['seconds']:5.0f} MB/s "
            f"({converted['process_seconds']:.2f} s with imports); "
            f"ratio {copied / converted['seconds']:.2f}; RssAnon {converted['RssAnon_MB']:.0f} MB, "
            f"VmHWM {converted['VmHWM_MB']:.0f} MB",
            flush=True,
        )
    shutil.rmtree(source)
    ratio = statistics.median(result["cp_seconds"] / result["seconds"] for result in results)
    print(f"median ratio {ratio:.2f} (bar {SPEED_BAR}), {nbytes / 1e9:.2f} GB")
    return {"bytes": nbytes, "rounds": results, "median_ratio": ratio}


def measure_memory(folder: Path) -> dict[str, Any]:
    """Convert one layer of DeepSeek-V3."""
    from moe_jax.benchmarking.synthetic_checkpoint import DEEPSEEK_V3_LAYER, write_synthetic_checkpoint

    source, output = folder / "source", folder / "output"
    nbytes = write_synthetic_checkpoint(source, DEEPSEEK_V3_LAYER, 4 * SHARD_BYTES)
    os.sync()
    result = {"bytes": nbytes, **convert_in_child(source, output)}
    shutil.rmtree(source)
    shutil.rmtree(output)
    print(
        f"DeepSeek-V3 layer: {nbytes / 1e9:.2f} GB of FP8 -> {result['output_bytes'] / 1e9:.2f} GB "
        f"in {result['seconds']:.0f} s, {result['parts']} parts; RssAnon {result['RssAnon_MB']:.0f} MB, "
        f"VmHWM {result['VmHWM_MB']:.0f} MB (bar {MEMORY_BAR_MB})"
    )
    return result


def usable_cores() -> int:
    """Cores that this process may use; `os.process_cpu_count` exists only from Python 3.13 on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main() -> None:
    """Measure, print every round, write JSON if asked; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed measurement (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, metavar="TMP", help="where to write (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    parser.add_argument("--only", choices=("speed", "memory"), help="measure only this")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        convert_here(*arguments.child)
        return
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/convert.py", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {usable_cores()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "numpy")},
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.only != "memory":
            results["speed"] = measure_speed(Path(name), arguments.rounds)
        if arguments.only != "speed":
            results["memory"] = measure_memory(Path(name))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    missed = results.get("speed", {"median_ratio": SPEED_BAR})["median_ratio"] < SPEED_BAR
    missed |= results.get("memory", {"VmHWM_MB": 0})["VmHWM_MB"] > MEMORY_BAR_MB
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
